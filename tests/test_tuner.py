"""Coordinate descent: a pure function of the results that stops only with a certificate."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epochal.tuner import Descent, Point, decay_for_window, descend, neighbours

GRID: dict[str, tuple[float, ...]] = {"lr": (0.001, 0.003, 0.01), "epochs": (2, 4, 8, 16), "wd": (0.1, 0.4, 1.6, 6.4)}
POINTS = [Point(lr=lr, epochs=int(e), wd=wd) for lr, e, wd in itertools.product(*GRID.values())]

Surface = dict[Point, float]


def bowl(seed: int) -> Surface:
    """A quasi-convex surface: a monotone function of a weighted distance to some grid point, with no ties."""
    source = random.Random(seed)
    centre = [source.uniform(-0.5, len(values) - 0.5) for values in GRID.values()]
    scales = [source.uniform(0.3, 3.0) for _ in GRID]
    power = source.choice((0.5, 1.0, 2.0))

    def loss(point: Point) -> float:
        place = [values.index(getattr(point, field)) for field, values in GRID.items()]
        squares = [s * (x - c) ** 2 for s, x, c in zip(scales, place, centre, strict=True)]
        return 3.0 + sum(squares) ** power

    return {point: loss(point) for point in POINTS}


def noise(seed: int) -> Surface:
    source = random.Random(seed)
    return {point: source.choice((math.inf, source.random(), source.random())) for point in POINTS}


def search(
    surface: Surface, start: Point, choose: Callable[[tuple[Point, ...]], list[Point]]
) -> tuple[Descent, Surface]:
    """Run a whole search, answering the wanted points that `choose` picks in each turn."""
    known: Surface = {}
    for _ in range(len(POINTS) + 1):
        state = descend(known.get, start, GRID)
        if not state.wanted:
            return state, known
        assert not state.certified
        for point in choose(state.wanted):
            known[point] = surface[point]
    raise AssertionError("the search does not end")


def is_star(surface: Surface, best: Point) -> bool:
    return all(surface[best] <= surface[point] for point in neighbours(best, GRID))


@given(st.integers(0, 10**6), st.sampled_from(POINTS))
@settings(max_examples=60, deadline=None)
def test_a_bowl_is_searched_to_a_point_that_beats_its_star(seed: int, start: Point) -> None:
    surface = bowl(seed)
    state, known = search(surface, start, list)
    assert state.certified
    assert state.best is not None
    assert is_star(surface, state.best)
    assert set(neighbours(state.best, GRID)) <= set(known)
    # A separable bowl has one such point: the minimum of the whole grid.
    assert surface[state.best] == min(surface.values())


@given(st.integers(0, 10**6), st.sampled_from(POINTS), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_any_surface_ends_and_the_order_of_results_does_not_matter(seed: int, start: Point, order: int) -> None:
    surface, source = noise(seed), random.Random(order)
    together, known = search(surface, start, list)
    one_by_one, known_slowly = search(surface, start, lambda wanted: [source.choice(wanted)])
    assert together == one_by_one
    assert known == known_slowly
    assert set(together.visited) == set(known)
    assert together.best is not None
    if math.isfinite(surface[together.best]):
        assert is_star(surface, together.best)


def test_the_first_question_is_the_star_of_the_start() -> None:
    start = POINTS[0]
    state = descend(lambda point: None, start, GRID)
    assert state.best is None
    assert not state.certified
    assert state.wanted == (start, *neighbours(start, GRID))
    assert len(state.wanted) == 4


def test_no_certificate_without_every_neighbour() -> None:
    surface = bowl(1)
    state, known = search(surface, POINTS[-1], list)
    best = state.best
    assert best is not None
    for left_out in neighbours(best, GRID):
        partial = {point: loss for point, loss in known.items() if point != left_out}
        assert not descend(partial.get, POINTS[-1], GRID).certified


def test_nothing_is_forgotten_while_results_are_missing() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    better = neighbours(start, GRID)[0]
    state = descend({start: 2.0, better: 1.0}.get, start, GRID)
    assert state.best == better
    assert not state.certified
    assert better not in state.wanted
    assert set(state.wanted) == set(neighbours(start, GRID)) - {better}


def test_a_diverged_neighbour_is_an_answer() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    losses = {start: 2.0, **dict.fromkeys(neighbours(start, GRID), math.inf)}
    state = descend(losses.get, start, GRID)
    assert state.certified
    assert state.best == start


def test_a_diverged_start_moves_to_what_did_not_diverge() -> None:
    start = Point(lr=0.01, epochs=4, wd=0.4)
    calm = Point(lr=0.003, epochs=4, wd=0.4)
    losses = {start: math.inf, **dict.fromkeys(neighbours(start, GRID), math.inf), calm: 3.0}
    state = descend(losses.get, start, GRID)
    assert state.best == calm
    assert set(state.wanted) == set(neighbours(calm, GRID)) - {start}


def test_a_search_where_all_diverged_ends() -> None:
    state = descend(lambda point: math.inf, POINTS[5], GRID)
    assert not state.wanted


def test_ties_do_not_wander() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    state = descend(lambda point: 1.0, start, GRID)
    assert state.best == start
    assert state.visited == (start, *neighbours(start, GRID))


def test_edges_name_the_fields_whose_grid_ends_at_the_best() -> None:
    corner = Point(lr=0.001, epochs=16, wd=0.4)
    surface = {point: float(point != corner) for point in POINTS}
    assert descend(surface.get, corner, GRID).edges == ("lr", "epochs")
    narrow = {"lr": (0.01,), "wd": GRID["wd"]}
    state = descend(lambda point: 1.0, Point(lr=0.01, epochs=3, wd=0.4), narrow)
    assert state.edges == ()
    assert all(point.epochs == 3 for point in state.visited)


def test_a_start_off_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start wd 0.2 is not on its grid"):
        descend(lambda point: None, Point(lr=0.01, epochs=4, wd=0.2), GRID)


def test_decay_for_window() -> None:
    # tau 0.5 epochs at lr 0.01 and 50 steps an epoch: wd = 1 / (0.5 * 0.01 * 50) = 4.
    assert decay_for_window(0.5, lr=0.01, steps_per_epoch=50, grid=(0.0, 0.1, 1.6, 3.2, 6.4)) == 3.2
