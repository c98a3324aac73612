"""Training works without Triton and with Triton but no GPU; the record names the path taken."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""

TRAIN = """
import sys
from pathlib import Path
import tiny
from epochal.run import AdamW, Fira, Spectra
from epochal.training.loop import train
from triton_kernels import backend
assert backend.HAS_TRITON == EXPECTED, backend.HAS_TRITON
space, _, config = tiny.workspace(Path(sys.argv[1]))
for name, optimizer in {"fira": Fira(lr=1e-2), "spectra": Spectra(base=AdamW(lr=1e-2))}.items():
    record = train(tiny.run(config, name=name, optimizer=optimizer, epochs=1), space)
    assert record.status == "done" and record.results["loss"] < 6, record
    paths = (record.provenance["loss_backend"], record.provenance["optimizer_backend"])
    assert paths == ("torch", "torch"), paths
"""


@pytest.mark.parametrize("hidden", [True, False], ids=["no triton", "triton without a GPU"])
def test_a_tiny_training_runs_in_torch(tmp_path: Path, hidden: bool) -> None:
    if not hidden:
        pytest.importorskip("triton")
    code = (HIDE if hidden else "") + TRAIN.replace("EXPECTED", str(not hidden))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests")))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
