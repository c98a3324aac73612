"""Shared by all tests: one thread, no network, and a tiny campaign that runs in seconds.

Some settings must come before the first import of triton: it decides at decoration whether a kernel is interpreted.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from campaigns import DATA, Campaign, made_text, make_campaign

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the tests of Slurm first: they mostly wait, so other files run in the meantime."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, its data config `tiny.toml` and the finished token store `work/data/tiny`."""
    from epochal.data.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "corpus.txt").write_text(made_text())
    (folder / "tiny.toml").write_text(DATA.format(corpus=folder / "corpus.txt"))
    prepare(str(folder / "tiny.toml"), folder / "work" / "data")
    return folder


@pytest.fixture
def campaign(tmp_path: Path, prepared: Path) -> Campaign:
    """A tiny campaign in which nothing has run yet."""
    return make_campaign(tmp_path / "campaign", prepared)
