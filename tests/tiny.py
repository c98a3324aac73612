"""Tiny text, stores and runs for the tests: made in a moment, the same on every machine."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from epochal.data.prepare import prepare
from epochal.data.store import TokenStore
from epochal.records import Workspace
from epochal.run import AdamW, Run

SPEAKERS = ["king", "shepherd", "prophet", "daughter", "servant", "stranger"]
DEEDS = ["saw", "heard", "feared", "followed", "blessed", "remembered"]
THINGS = ["the river", "a mountain", "the city", "his people", "her vineyard", "the stars"]


def sentence(rng: random.Random) -> str:
    """A sentence with something to learn: a speaker prefers one deed, a deed one thing."""
    who = int(rng.random() * len(SPEAKERS))
    deed = who if rng.random() < 0.7 else int(rng.random() * len(DEEDS))
    thing = (deed + 1) % len(THINGS) if rng.random() < 0.7 else int(rng.random() * len(THINGS))
    return f"And the {SPEAKERS[who]} {DEEDS[deed]} {THINGS[thing]}."


def documents(count: int = 240, seed: int = 0) -> list[str]:
    """`count` distinct documents of two to eight sentences. Only `random()` is used: its numbers never change."""
    rng = random.Random(seed)
    return [
        f"Chapter {number}. " + " ".join(sentence(rng) for _ in range(2 + int(rng.random() * 7)))
        for number in range(count)
    ]


def write_config(folder: Path, source: str, *, tokenizer: str = "train = 300", split: str = "", top: str = "") -> Path:
    """Write a data config `folder/tiny.toml`; `source`, `tokenizer`, `split` and `top` are lines of TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.toml"
    split = split or "validation = 0.1\ntest = 0.1"
    path.write_text(
        f'licence = "made up"\n{top}\n[source]\n{source}\n[tokenizer]\n{tokenizer}\n[split]\n{split}\n',
        encoding="utf-8",
    )
    return path


def write_text(folder: Path, texts: list[str], **config: str) -> Path:
    """Write texts as one file of documents, and its data config; returns the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n====\n".join(texts), encoding="utf-8")
    return write_config(folder, f'files = ["{folder}/corpus.txt"]\nseparator = "===="', **config)


def workspace(folder: Path) -> tuple[Workspace, TokenStore, Path]:
    """Return a fresh workspace below `folder` with one token store in it, and the data config."""
    space = Workspace("tiny", folder / "results", folder / "work")
    config = write_text(folder / "text", documents())
    return space, prepare(str(config), space.data), config


def run(config: Path, **changes: Any) -> Run:
    """A run of a few dozen steps that a CPU finishes in a second; `changes` replace fields, also the optimizer's."""
    optimizer = AdamW(lr=changes.pop("lr", 1e-2), wd=changes.pop("wd", 0.1))
    base = Run(
        name="tiny",
        model="w16",
        data=str(config),
        unique_tokens=2048,
        epochs=3,
        batch_size=4,
        sequence_length=32,
        optimizer=optimizer,
        warmup=0.1,
        precision="fp32",
        num_evals=4,
    )
    return replace(base, **changes)
