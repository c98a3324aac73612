"""The losses of two tiny runs, kept as files: a change of the numbers is noticed, and has to be meant.

    python tests/golden/test_golden.py          makes the files again, after a change that is meant to alter losses

They were made on a CPU with one thread, in float32, from the made-up text and the runs of `tests/tiny.py`: text, splits,
tokenizer, initial weights and batches are the same bytes everywhere (the hash of the token file is kept too and compared
exactly). What may differ between CPUs is the order and width of float32 sums in matrix products: a relative 1e-7 a step.
Training amplifies it:
a last-bit change of every initial weight moved the losses of these runs by at most 2e-6. Ten times that is allowed.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for the second way of running this file
import tiny  # noqa: E402

TOLERANCE = 2e-5
"""Nats: what different CPUs' float32 rounding needs, and far less than any change of the mathematics makes."""

RUNS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "heavy_decay_fixed_order": {"wd": 1.6, "data_order": "fixed"},
}


def losses(name: str, folder: Path) -> dict[str, Any]:
    """Train one of the runs below `folder`; returns what is kept of it."""
    import torch

    from epochal.training.loop import train

    space, store, config = tiny.workspace(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        record = train(tiny.run(config, name=name, **RUNS[name]), space)
    finally:
        torch.set_num_threads(threads)
    assert record is not None
    lines = [json.loads(line) for line in (space.folder(name) / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens": store.meta["files"]["train.bin"],
        "train": [[line["step"], line["train_loss"]] for line in lines if "train_loss" in line],
        "validation": record.results["curve"],
        "test": record.results["test_loss"],
    }


@pytest.mark.parametrize("name", sorted(RUNS))
def test_losses_are_those_on_file(name: str, tmp_path: Path) -> None:
    expected = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    found = losses(name, tmp_path)
    assert found["tokens"] == expected["tokens"], "the token store changed"
    for split in ("train", "validation"):
        assert [step for step, _ in found[split]] == [step for step, _ in expected[split]]
        assert [loss for _, loss in found[split]] == pytest.approx(
            [loss for _, loss in expected[split]], abs=TOLERANCE, rel=0.0
        )
    assert found["test"] == pytest.approx(expected["test"], abs=TOLERANCE, rel=0.0)


def test_the_runs_differ_by_more_than_the_tolerance() -> None:
    kept = [json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))["test"] for name in sorted(RUNS)]
    gaps = [abs(one - other) for index, one in enumerate(kept) for other in kept[:index]]
    assert min(gaps) > 10 * TOLERANCE


if __name__ == "__main__":
    for run_name in RUNS:
        with tempfile.TemporaryDirectory() as temporary:
            text = json.dumps(losses(run_name, Path(temporary)), indent=1)
        (HERE / f"{run_name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"{run_name}.json")
