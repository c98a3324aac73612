"""Each page of the documentation that promises to run is run, block by block, as a reader would paste it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from epochal.config import REPOSITORY

PAGES = ["own_corpus", "asymptotes", "optimizers", "cluster"]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """The shell and python blocks of a page, in order."""
    return BLOCK.findall((REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8"))


def run(language: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One block in a folder, with the environment's own commands first on the path."""
    command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    assert found
    for language, text in found:
        done = run(language, text, tmp_path)
        assert done.returncode == 0, f"{text}\n--- ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
