"""Groups of 1, 2 and 4 gloo processes, started when a test first asks for them and shared by all."""

from collections.abc import Callable, Iterator

import pytest
from ranks import Group


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
