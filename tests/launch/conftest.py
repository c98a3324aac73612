"""A Slurm for the tests of this folder; they are skipped where it cannot run."""

import os
from collections.abc import Iterator

import pytest
from slurm import Slurm, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster of two nodes. Skips where it cannot run; EPOCHAL_REQUIRE_SLURM=1 makes that a failure."""
    reason = missing()
    if reason is not None:
        if os.environ.get("EPOCHAL_REQUIRE_SLURM") == "1":
            pytest.fail(f"EPOCHAL_REQUIRE_SLURM is set, but {reason}")
        pytest.skip(reason)
    cluster = Slurm()
    yield cluster
    cluster.stop()
