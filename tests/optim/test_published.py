"""Spectra(compat="upstream") against the code published with SPECTRA, which is not part of this repository.

    EPOCHAL_SPECTRA_CODE=PATH pytest tests/optim/test_published.py

PATH is a clone of github.com/mlolab/llm-spectral-clipping; without one these tests skip, and the float64 rewrite in
test_spectra.py stays the oracle. Tolerances: docs/spectra.md section 8.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from epochal.optim import Spectra

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = ((12, 20), (20, 12), (12, 20), (16, 16), (40, 8), (11,))
LR, DECAY, STEPS, WARM = 1e-2, 0.1, 20, 5
HYPER: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95)},
    "signum": {},
    "sgdm": {},
    "lion": {"betas": (0.9, 0.99)},
    "ademamix": {"betas": (0.9, 0.95, 0.999), "alpha": 8.0, "alpha_warmup": STEPS, "beta3_warmup": STEPS},
    "mars": {},
    "mars-lion": {"mars_type": "mars-lion"},
}


@pytest.fixture(scope="module")
def published() -> Any:
    """Return a function that imports the published module `optim.NAME`, with torch.compile switched off."""
    path = os.environ.get("EPOCHAL_SPECTRA_CODE")
    if not path:
        pytest.skip("EPOCHAL_SPECTRA_CODE names no clone of llm-spectral-clipping")
    source = Path(path) / "src"
    assert (source / "optim" / "spectra.py").is_file(), f"{source} holds no optim/spectra.py"

    def module(name: str) -> ModuleType:
        try:
            return importlib.import_module(f"optim.{name}")
        except ModuleNotFoundError as missing:
            pytest.skip(f"this copy of the published code lacks {missing.name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(source))
        patch.setattr(torch, "compile", lambda function: function)
        yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "optim"]:
        del sys.modules[name]


def base_of(published: Any, base: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the published base optimizer with the hyper-parameters of `HYPER`."""
    shared = {"lr": LR, "weight_decay": DECAY}
    if base == "adamw":
        return torch.optim.AdamW(params, betas=(0.9, 0.95), **shared)
    if base in ("signum", "sgdm"):
        kind = published("sign").Signum if base == "signum" else published("sgdm").SGDM
        return kind(params, momentum=0.95, nesterov=True, **shared)
    if base == "lion":
        return published("lion").Lion(params, **HYPER[base], **shared)
    if base == "ademamix":
        return published("ademamix").AdEMAMix(params, **HYPER[base], **shared)
    vectors = {"lr_1d": LR / 3, "betas_1d": (0.8, 0.999), "weight_decay_1d": 0.1}
    kind = "mars-lion" if base == "mars-lion" else "mars-adamw"
    return published("mars").MARS(params, mars_type=kind, **vectors, **shared)


def compare(published: Any, base: str, tolerance: float, **options: Any) -> None:
    """Take 20 steps with both from equal weights and gradients; compare the worst deviation to the largest movement."""
    draw = torch.Generator().manual_seed(0)
    start = [0.3 * torch.randn(*shape, generator=draw) for shape in SHAPES]
    expected, params = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    published_options = {
        "clip_c": options["clip"],
        "apply_to": options["apply_to"],
        "ns_steps": options["iterations"],
        "ns_float32": options["dtype"] == F32,
        "post_process": "normalize" if options.get("operator") == "normalize" else "clip",
        "clip_decay_type": options.get("clip_decay", "constant"),
        "clip_decay_fract": 0.5,
        "clip_final_scale": 0.1,
    }
    wrapper = published("spectra").SPECTRA(
        base_of(published, base, expected), warmup_steps=WARM, base_lr=LR, total_steps=STEPS, **published_options
    )
    schedule = {"warmup_steps": WARM, "total_steps": STEPS, "clip_decay_fraction": 0.5, "clip_final_scale": 0.1}
    own = {**HYPER[base], **schedule, **options}
    optimizer = Spectra(params, LR, base=base.split("-")[0], compat="upstream", weight_decay=DECAY, **own)
    pre_clip, grad_clip = options.get("pre_clip"), options.get("grad_clip")
    for k in range(STEPS):
        now = LR * (k + 1) / WARM if k < WARM else LR
        for group in (*wrapper.param_groups, *optimizer.param_groups):
            group["lr"] = now
        for p, q in zip(expected, params, strict=True):
            p.grad = 0.1 * torch.randn(*p.shape, generator=draw)
            q.grad = p.grad.clone()
        if pre_clip:  # the published code does this in the training loop
            clip_sigvals = published("post_process").clip_sigvals
            c = pre_clip * LR / now if k < WARM else pre_clip
            for p in expected:
                if p.ndim == 2:
                    p.grad = clip_sigvals(p.grad, c, options["iterations"], options["dtype"] == F32)
        if grad_clip:
            torch.nn.utils.clip_grad_norm_(expected, grad_clip)
        wrapper.step()
        optimizer.step()
    moved = max(float((p.detach() - w).abs().max()) for p, w in zip(expected, start, strict=True))
    worst = max(float((p.detach() - q.detach()).abs().max()) for p, q in zip(expected, params, strict=True))
    assert worst <= tolerance * moved, f"{worst / moved:.1e} of the movement"


@pytest.mark.parametrize("apply_to", ["2d", "all"])
@pytest.mark.parametrize("base", HYPER)
def test_float32_equals_the_published_code(published: Any, base: str, apply_to: str) -> None:
    compare(published, base, 5e-4, clip=1.0, apply_to=apply_to, iterations=15, dtype=F32)


def test_pre_clip_and_global_clip_equal_the_published_code(published: Any) -> None:
    options = {"pre_clip": 0.2, "grad_clip": 0.5}
    compare(published, "adamw", 5e-4, clip=2.0, apply_to="all", iterations=10, dtype=F32, **options)


@pytest.mark.parametrize("decay", ["linear", "sqrt", "cosine", "exp", "square"])
def test_a_decaying_threshold_equals_the_published_code(published: Any, decay: str) -> None:
    compare(published, "adamw", 5e-4, clip=1.0, apply_to="all", iterations=15, dtype=F32, clip_decay=decay)


@pytest.mark.parametrize("base", ["adamw", "ademamix", "sgdm"])
def test_an_unconverged_iteration_equals_the_published_code(published: Any, base: str) -> None:
    compare(published, base, 1e-2, clip=1e-2, apply_to="2d", iterations=10, dtype=F32)


@pytest.mark.parametrize("base", ["adamw", "ademamix", "mars", "signum"])
def test_bfloat16_equals_the_published_code(published: Any, base: str) -> None:
    compare(published, base, 3e-2, clip=1.0, apply_to="all", iterations=10, dtype=BF16)


def test_bfloat16_normalize_equals_the_published_code(published: Any) -> None:
    compare(published, "adamw", 6e-2, clip=1.0, operator="normalize", apply_to="all", iterations=5, dtype=BF16)
