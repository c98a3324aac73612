"""Each page of the documentation that promises to run is run, block by block, as a reader would paste it."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epochal.config import REPOSITORY

PAGES = ["own_corpus", "asymptotes", "optimizers", "cluster", "how_it_works"]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The shell and python blocks of a page, in order.

    Neighbours in python share an interpreter, since most of their time goes into the same imports, but no names.
    """
    text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
    found: list[tuple[str, str]] = []
    for language, bodies in itertools.groupby(BLOCK.findall(text), key=lambda block: str(block[0])):
        if language == "sh":
            found += bodies
        else:
            found.append((language, "\n".join(f"exec({body!r}, {{'__name__': '__main__'}})" for _, body in bodies)))
    return found


def run(language: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One block in a folder, with the environment's own commands first on the path."""
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=800
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    assert found
    for language, text in found:
        done = run(language, text, tmp_path)
        assert done.returncode == 0, f"{text}\n--- ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"


READERS_OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (8, 16))]
batches = [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}] * 8
arguments = TrainingArguments("out", per_device_train_batch_size=8, max_steps=8, report_to="none", use_cpu=True,
                              disable_tqdm=True)
def loss(): return model(**batches[0]).loss.item()
first = loss()
"""
LOWER = """
assert loss() < first - 0.1, (loss(), first)
first = loss()
"""


def test_what_the_readme_shows_of_the_optimizers_runs_as_it_stands(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (block,) = [body for language, body in BLOCK.findall(text) if language == "python"]
    loop, trainer = block.split("optimizer = Spectra")
    done = run("python", f"{READERS_OWN}{loop}{LOWER}optimizer = Spectra{trainer}{LOWER}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_test_that_a_promise_names_exists() -> None:
    text, file = (REPOSITORY / "docs" / "promises.md").read_text(encoding="utf-8"), ""
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", text)
    assert len(named) > 20
    for path, test in named:
        file = path or file  # `::test` is of the file before it
        if test or path:
            source = (REPOSITORY / file).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in source, f"{file}::{test} is promised and does not exist"
