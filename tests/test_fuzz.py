"""Mutated configs and records: each is accepted and finite, or refused in one sentence, soon.

`benchmarks/fuzz.py` tries as many as you like.
"""

import time
from pathlib import Path

import pytest
from fuzzing import KINDS, judge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"scale": 40, "launch": 8}  # planning takes long, and YAML that nests deeply


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_accepted_or_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    @settings(
        max_examples=EXAMPLES.get(kind, 60),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(seed=st.integers(0, 2**32))
    def each(seed: int) -> None:
        start = time.process_time()
        judge(kind, seed, tmp_path)
        assert time.process_time() - start < 5

    each()


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_accepts_the_files_as_they_are(kind: str, tmp_path: Path) -> None:
    here = KINDS[kind]
    path = min(here.good, key=lambda path: path.stat().st_size)
    folder = tmp_path / "x" / "records" if kind == "record" else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    same = folder / path.name
    same.write_text(here.write(here.read(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert here.use(same) is not None
