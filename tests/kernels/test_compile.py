"""Every kernel compiles to machine code for a GPU, on a machine without one: what the interpreter lets pass, this does not.

The wrappers are called as they are; a launch compiles for the architecture named instead of running.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMPILE = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface
from triton_kernels import backend
from triton_kernels.row_dropout import row_dropout_kernel
from triton_kernels.softmax_add import softmax_add_
from triton_kernels.softmax_loss import softmax_loss
from triton_kernels.sparse_loss import sparse_loss

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
OPTIONS = ("num_warps", "num_stages")
compiled = []

def kind(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"

def launch(kernel, grid):
    def call(*values, **named):
        constants = {k: v for k, v in named.items() if k not in OPTIONS}
        names = [name for name in kernel.arg_names if name not in constants]
        assert len(names) == len(values), (kernel, names)
        signature = {name: kind(v) for name, v in zip(names, values)} | {name: "constexpr" for name in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {k: v for k, v in named.items() if k in OPTIONS}
        out = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        compiled.append(kernel.__name__)
        assert len(out.asm["cubin"]) > 1000
        print(kernel.__name__, out.metadata.shared, "bytes of shared memory")
        assert out.metadata.shared <= 101376, "more than a program has on an RTX 4090"
    return call

KernelInterface.__getitem__ = launch
assert not backend.INTERPRETED
backend.backend = lambda device: "triton"

V, N, K = 5000, 4, 8
z, p = torch.randn(N, V, dtype=torch.bfloat16), torch.rand(N, V)
y, ids = torch.arange(N), torch.arange(K).repeat(N, 1)
softmax_loss(z, y, p, 0.5, 2.0)
softmax_add_(p, z, 0.5, 2.0, True)
sparse_loss(z, y, ids, p[:, :K].half(), 0.5)
softmax_loss(torch.randn(N, 50304, dtype=torch.bfloat16), y)
row_dropout_kernel(z, torch.arange(N), 0.5)
print(len(set(compiled)), "kernels")
"""


def test_all_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT)))}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    files = (ROOT / "triton_kernels").glob("*.py")
    written = sum(file.read_text().count("_kernel(\n") for file in files)
    assert done.stdout.endswith(f"{written} kernels\n"), done.stdout
