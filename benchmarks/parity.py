"""Many processes against one: every preset and optimizer on 1, 2 and 4 gloo processes, and every accelerate YAML.

    python benchmarks/parity.py [--sets plain small clipped bf16 launched]      appends missing rows to benchmarks/parity.csv

The oracle is a plain loop in one process. A model of 33 odd matrices (8 for each of 4 processes) takes 30 steps, in which
Fira computes its bases twice.

    plain      lr 0.02. Bar: 1e-5
    small      lr 0.01; weights move so little that a few of their last bits may exceed the bar. Bar: 1e-5
    clipped    clipped at 0.05 in every step, two micro-batches; four optimizers on 4 processes. Bar: the larger of 1e-5 and
               twice DDP's deviation
    bf16       the micro scale's w32 on the King James text in bf16, half a batch on each process, against DDP's loss.
               Bar: 2e-3 nats
    launched   a Run under `accelerate launch` with the committed YAML, the `-nodes` ones as two nodes. Bar: 1e-5

Muon's products are in bfloat16, whose last bit is 2^-8: its bar is twice `rounding`, and "muon-float32" has products in
float32.

deviation      the largest difference of a matrix from the oracle's, as a share of its largest movement; `all_deviation` with
               the embedding and the norms; `last_bits` in units of the last bit of its largest element.
               Launched and bf16: difference of losses, in nats per token.
rounding       the largest deviation of the plain loop if it sums the gradient in 2, 4 or 8 parts
state_share    bytes of matrix state on the process with the most, relative to one process
work_share     clips, orthogonalizations and new bases of the busiest process, relative to one process
proof          the largest difference in the run's own check of its first step
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests" / "distributed"), str(HERE.parent / "tests"), str(HERE)]

import torch  # noqa: E402
import toy  # noqa: E402
from measure import append, environment, known  # noqa: E402
from ranks import Group, group  # noqa: E402

from epochal.data.prepare import prepare  # noqa: E402
from epochal.records import Workspace  # noqa: E402
from epochal.run import AdamW, Fira, Optimizer, Spectra  # noqa: E402
from epochal.scale import load_scale  # noqa: E402
from epochal.search.descent import Point  # noqa: E402

TABLE = HERE / "parity.csv"
PROFILES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
KINDS = ("adamw", "fira", *(f"{base}-spectra" for base in toy.BASES), "muon", "muon-float32")
MAIN = ("adamw", "fira", "adamw-spectra", "muon-float32")
DEPTH = 11
BAR = 1e-5
BAR_BF16 = 2e-3
RATES = {"plain": 0.02, "small": 0.01, "clipped": 0.02}
YAMLS = sorted(path.stem for path in (HERE.parent / "configs" / "accelerate").glob("*.yaml"))


def cells(name: str) -> Iterator[dict[str, Any]]:
    """The keys of a set's rows; DDP comes before the presets that are compared with it."""
    if name == "launched":
        for profile in YAMLS:
            yield {
                "set": name,
                "processes": 1 if profile in ("cpu", "gpu") else 2,
                "profile": profile,
                "optimizer": "fira",
            }
        return
    if name == "bf16":
        for kind in ("adamw", "fira", "adamw-spectra"):
            for profile in PROFILES:
                yield {"set": name, "processes": 2, "profile": profile, "optimizer": kind}
        return
    for world in {"plain": (1, 2, 4), "small": (2,), "clipped": (2, 4)}[name]:
        for kind in MAIN if (name, world) == ("clipped", 4) else KINDS:
            for profile in PROFILES:
                yield {"set": name, "processes": world, "profile": profile, "optimizer": kind}


class Oracle:
    """The results of one process by optimizer, each computed once."""

    def __init__(self, name: str) -> None:
        self.name, self._results = name, dict[tuple[str, int], dict[str, Any]]()

    @property
    def setting(self) -> dict[str, Any]:
        return {"clip_norm": 0.05} if self.name == "clipped" else {}

    def __call__(self, kind: str, sums: int = 1) -> dict[str, Any]:
        if (kind, sums) not in self._results:
            rate = RATES[self.name]
            self._results[kind, sums] = toy.alone(kind, toy.STEPS, DEPTH, sums=sums, peak=rate, **self.setting)
        return self._results[kind, sums]


def measured(
    cell: dict[str, Any], oracle: Oracle, processes: Group, ddp: dict[tuple[int, str], float]
) -> dict[str, Any]:
    """Train one cell and return its row; `ddp` keeps the deviation of DDP by (processes, optimizer)."""
    kind, world, parts = cell["optimizer"], cell["processes"], 2 if cell["set"] == "clipped" else 1
    setting = {"peak": RATES[cell["set"]], **oracle.setting}
    results = processes.run("toy:trained_with", cell["profile"], kind, setting, parts, toy.STEPS, DEPTH)
    one, first = oracle(kind), results[0]
    deviation = toy.distance(one, first)
    rounding = max(toy.distance(one, oracle(kind, sums)) for sums in (2, 4, 8))
    if cell["profile"] == "ddp":
        ddp[world, kind] = deviation
    bar = max(BAR, 2 * ddp[world, kind]) if cell["set"] == "clipped" else BAR
    bar = max(bar, 2 * rounding) if kind == "muon" else bar
    work = [result["clips"] + result["refreshes"] for result in results]
    same = all(torch.equal(weight, other["weights"][n]) for other in results for n, weight in first["weights"].items())
    state = sum(one["state"][n] for n in first["whole"])  # 0 for AdamW, which steps no matrix whole
    return {
        **cell,
        "lr": RATES[cell["set"]],
        "on": first["backend"],
        "matrices": first["matrices"],
        "deviation": f"{deviation:.2e}",
        "all_deviation": f"{toy.distance(one, first, matrices=False):.2e}",
        "last_bits": f"{toy.distance(one, first, bits=True):.1f}",
        "rounding": f"{rounding:.2e}",
        "bar": f"{bar:.2e}",
        "ranks_identical": same,
        "state_share": f"{max(r['bytes'] for r in results) / state:.3f}" if state else "",
        "work_share": f"{max(work) / (one['clips'] + one['refreshes']):.3f}" if state else "",
        "work_counted": sum(work) == one["clips"] + one["refreshes"],
        "proof": "" if first["error"] is None else f"{first['error']:.1e}",
    }


def verdict(row: dict[str, Any]) -> str:
    """Return "met", or the first condition that a row fails; a cell that its set does not measure is empty."""
    expected = {"ddp": "DistributedDataParallel"}.get(row["profile"], row["profile"])
    shares = [float(row[name]) for name in ("state_share", "work_share") if row[name] != ""]
    failed = {
        "off": row["set"] != "launched" and row["on"] != expected,
        "too far": not float(row["deviation"]) <= float(row["bar"]),
        "ranks differ": str(row["ranks_identical"]) not in ("True", ""),
        "counts differ": str(row["work_counted"]) not in ("True", ""),
        "no share": any(share > 1 / int(row["processes"]) + 0.1 for share in shares),
    }
    return next((name for name, wrong in failed.items() if wrong), "met")


def in_bf16(cell: dict[str, Any], space: Workspace, processes: Group, ddp: dict[str, float]) -> dict[str, Any]:
    """Train one cell on real text and return its row; `ddp` keeps the loss of DDP by optimizer."""
    adamw = AdamW(lr=0.01, wd=0.8)
    kinds: dict[str, Optimizer] = {
        "adamw": adamw,
        "fira": Fira(lr=0.01, wd=0.8),
        "adamw-spectra": Spectra(base=adamw, clip=2.0),
    }
    kind, profile = cell["optimizer"], cell["profile"]
    point = Point(lr=adamw.lr, epochs=8, wd=adamw.wd)
    run = replace(load_scale("micro").run("w32", 24576, point, seed=0), precision="bf16", optimizer=kinds[kind])

    def loss_and_provenance(profile: str) -> tuple[float, dict[str, Any]]:
        named = replace(run, name=f"{kind}-{profile}")
        results = processes.run("chain:part", profile, space, named, None, run.batch_size // cell["processes"])[0]
        return results["loss"], results["provenance"]

    if kind not in ddp and profile != "ddp":
        ddp[kind], _ = loss_and_provenance("ddp")
    loss, provenance = loss_and_provenance(profile)
    deviation = abs(loss - ddp.setdefault(kind, loss))
    proof = provenance["update_error"]
    return {
        **cell,
        "lr": adamw.lr,
        "on": "DistributedDataParallel" if provenance["sharding"] == "replicated" else provenance["sharding"],
        "matrices": provenance["matrices"],
        "deviation": f"{deviation:.2e}",
        **dict.fromkeys(("all_deviation", "last_bits", "rounding"), ""),
        "bar": f"{BAR_BF16:.2e}",
        **dict.fromkeys(("ranks_identical", "state_share", "work_share", "work_counted"), ""),
        "proof": "" if proof is None else f"{proof:.1e}",
    }


def launched(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Launch a Run with a committed YAML and compare its losses with those of one process."""
    import launching

    result = launching.launched_and_alone(cell["profile"], folder, cell["processes"])
    return {
        **cell,
        "lr": 0.01,
        "on": result["backend"],
        "matrices": result["matrices"],
        "deviation": f"{result['deviation']:.2e}",
        "all_deviation": "",
        "last_bits": "",
        "rounding": "",
        "bar": f"{BAR:.2e}",
        "ranks_identical": True,
        "state_share": "",
        "work_share": "",
        "work_counted": True,
        "proof": "" if result["update_error"] is None else f"{result['update_error']:.1e}",
    }


def write(row: dict[str, Any]) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("accelerate", "deepspeed")}
    append(TABLE, {**row, "verdict": verdict(row), **environment("cpu"), **versions})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=[*RATES, "bf16", "launched"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONWARNINGS"] = "ignore"  # for the started processes: torch warns that it renames its collectives
    for name in options.sets:
        missing = [cell for cell in cells(name) if not known(TABLE, cell)]
        if name == "launched":
            for cell in missing:
                with tempfile.TemporaryDirectory() as folder:
                    write(launched(cell, Path(folder)))
            continue
        if name == "bf16":
            with tempfile.TemporaryDirectory() as folder, group(2) as processes:
                space, losses = Workspace("micro", Path(folder) / "results", Path(folder) / "work"), dict[str, float]()
                prepare("kjv", space.data)
                for cell in missing:
                    write(in_bf16(cell, space, processes, losses))
            continue
        oracle, off = Oracle(name), dict[tuple[int, str], float]()
        for world in sorted({cell["processes"] for cell in missing}):
            with group(world) as processes:
                for cell in missing:
                    if cell["processes"] == world:
                        if name == "clipped" and cell["profile"] != "ddp" and (world, cell["optimizer"]) not in off:
                            measured({**cell, "profile": "ddp"}, oracle, processes, off)
                        write(measured(cell, oracle, processes, off))


if __name__ == "__main__":
    main()
