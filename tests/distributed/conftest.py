"""Groups of 1, 2 and 4 gloo processes, started when a test first needs them and shared by all tests."""

from collections.abc import Callable, Iterator

import pytest
from ranks import Group, start_server


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import torch, transformers and DeepSpeed for the groups while other tests run."""
    if any("processes" in getattr(item, "fixturenames", ()) for item in session.items):
        start_server()


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Group]]:
    """A function from a number of processes to their group."""
    groups: dict[int, Group] = {}

    def get(world: int) -> Group:
        if world in groups and not groups[world].alive:
            groups.pop(world).close()
        if world not in groups:
            groups[world] = Group(world)
        return groups[world]

    yield get
    for group in groups.values():
        group.close()
