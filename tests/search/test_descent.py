"""Coordinate descent: a pure function of the results that stops only with a certificate."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epochal.scale import Point, decay_for_window
from epochal.search.descent import (
    NOT_STARTED,
    Descent,
    Noise,
    between_points,
    certify,
    descend,
    members_limit,
    neighbours,
    pooled_noise,
    possible_gain,
)

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
    surface: Surface, start: Point, choose: Callable[[tuple[Point, ...]], list[Point]], way: str = "in turn"
) -> tuple[Descent, Surface]:
    """Run a whole search, answering the wanted points that `choose` picks in each turn."""
    known: Surface = {}
    for _ in range(len(POINTS) + 1):
        state = descend(known.get, start, GRID, way)
        if not state.wanted:
            return state, known
        assert not state.certified
        for point in choose(state.wanted):
            known[point] = surface[point]
    raise AssertionError("the search does not end")


def is_star(surface: Surface, best: Point) -> bool:
    return all(surface[best] <= surface[point] for point in neighbours(best, GRID))


WAYS = ("in turn", "together")


@given(st.integers(0, 10**6), st.sampled_from(POINTS), st.sampled_from(WAYS))
@settings(max_examples=100, deadline=None)
def test_a_bowl_is_searched_to_a_point_that_beats_its_star(seed: int, start: Point, way: str) -> None:
    surface = bowl(seed)
    state, known = search(surface, start, list, way)
    assert state.certified
    assert state.best is not None
    assert is_star(surface, state.best)
    assert set(neighbours(state.best, GRID)) <= set(known)
    # A separable bowl has one such point: the minimum of the whole grid.
    assert surface[state.best] == min(surface.values())


@given(st.integers(0, 10**6), st.sampled_from(POINTS), st.integers(0, 10**6), st.sampled_from(WAYS))
@settings(max_examples=100, deadline=None)
def test_any_surface_ends_and_the_order_of_results_does_not_matter(
    seed: int, start: Point, order: int, way: str
) -> None:
    surface, source = noise(seed), random.Random(order)
    together, known = search(surface, start, list, way)
    one_by_one, known_slowly = search(surface, start, lambda wanted: [source.choice(wanted)], way)
    assert together == one_by_one
    assert known == known_slowly
    assert set(together.visited) == set(known)
    assert together.best is not None
    if math.isfinite(surface[together.best]):
        assert is_star(surface, together.best)


def test_together_the_first_question_is_the_star_of_the_start() -> None:
    start = POINTS[0]
    state = descend(lambda point: None, start, GRID, "together")
    assert state.best is None
    assert not state.certified
    assert set(state.wanted) == {start, *neighbours(start, GRID)}
    assert len(state.wanted) == 4


def test_in_turn_one_neighbour_while_a_field_is_open_then_the_rest_at_once() -> None:
    """From (0.003, 4, 0.4): lr is right, epochs and decay each want one step up."""
    start = Point(lr=0.003, epochs=4, wd=0.4)
    away = {"lr": (0.003, 0.4), "epochs": (8, 0.2), "wd": (1.6, 0.1)}

    def loss(point: Point) -> float:
        return sum(abs(math.log(point.get(field) / best)) * cost for field, (best, cost) in away.items())

    known, rounds = dict[Point, float](), []
    while (state := descend(known.get, start, GRID)).wanted:
        rounds.append(list(state.wanted))
        known |= {point: loss(point) for point in state.wanted}
    at = [[(point.lr, point.epochs, point.wd) for point in batch] for batch in rounds]
    assert at == [
        [(0.003, 4, 0.4), (0.01, 4, 0.4)],  # the first two are asked whatever comes
        [(0.001, 4, 0.4)],  # lr is settled
        [(0.003, 8, 0.4)],  # better: the centre moves
        [(0.003, 8, 1.6)],  # decay is open and comes before the next step of epochs; better again
        [(0.003, 8, 6.4)],  # on in the same direction
        [(0.01, 8, 1.6), (0.001, 8, 1.6), (0.003, 16, 1.6), (0.003, 4, 1.6)],  # what the certificate lacks
    ]
    assert state.certified and state.best == Point(lr=0.003, epochs=8, wd=1.6)


def test_certificates_found_in_another_way_are_kept() -> None:
    """A walk that lacks a result accepts the end of a walk of another way: with all its neighbours, and lower."""
    kept = 0
    for seed in range(40):
        surface, start = bowl(seed), POINTS[seed]
        for way, other in (WAYS, WAYS[::-1]):
            ended, known = search(surface, start, list, way)
            state = descend(known.get, start, GRID, other)
            assert state.certified and state.best == ended.best
            assert {state.best, *neighbours(state.best, GRID)} <= set(state.visited)
            unfinished = [point for point in neighbours(state.best, GRID) if point not in (start, state.best)]
            for point in unfinished:
                assert not descend({p: known[p] for p in known if p != point}.get, start, GRID, other).certified
            own = {point: known[point] for point in known if point in state.visited}
            kept += state.visited != search(own | surface, start, list, other)[0].visited
    assert kept > 10  # in these the own walk would have gone elsewhere


def test_a_search_left_to_itself_asks_the_same_whatever_comes_first() -> None:
    """A star that is complete by chance before its round is: it must not cut the round short (one surface in 6,000)."""
    surface, start = noise(293), Point(lr=0.003, epochs=16, wd=1.6)
    _, known = search(surface, start, list, "together")
    for seed in range(40):
        source = random.Random(seed)
        _, one_by_one = search(surface, start, lambda wanted: [source.choice(wanted)], "together")  # noqa: B023
        assert one_by_one == known


def test_only_a_lower_certificate_ends_a_walk() -> None:
    """The walk goes to a higher rate; others went to a higher decay and know all around it."""
    grid = {"lr": (0.001, 0.003, 0.01, 0.03), "wd": (0.1, 0.2, 0.4)}
    start = Point(lr=0.003, epochs=4, wd=0.1)
    ahead, end = start.at("lr", 0.01), start.at("wd", 0.2)
    others = {start: 1.0, **dict.fromkeys(neighbours(start, grid), 2.0), **dict.fromkeys(neighbours(end, grid), 2.0)}
    others |= {start: 1.0, end: 0.8, ahead: 0.9}
    kept = descend(others.get, start, grid)
    assert kept.certified and kept.best == end and set(neighbours(end, grid)) <= set(kept.visited)
    further = descend((others | {ahead.at("wd", 0.2): 2.0, ahead.at("lr", 0.03): 0.7}).get, start, grid)
    assert not further.certified and further.best == ahead.at("lr", 0.03)


@pytest.mark.parametrize("way", WAYS)
def test_no_certificate_without_every_neighbour(way: str) -> None:
    for seed in range(30):
        surface = bowl(seed)
        state, known = search(surface, POINTS[-1], list, way)
        best = state.best
        assert best is not None
        for left_out in neighbours(best, GRID):
            partial = {point: loss for point, loss in known.items() if point != left_out}
            assert not descend(partial.get, POINTS[-1], GRID, way).certified


def test_nothing_is_forgotten_while_results_are_missing() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    better = neighbours(start, GRID)[0]
    state = descend({start: 2.0, better: 1.0}.get, start, GRID, "together")
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
    state = descend(losses.get, start, GRID, "together")
    assert state.best == calm
    assert set(state.wanted) == set(neighbours(calm, GRID)) - {start}


def test_a_search_where_all_diverged_ends() -> None:
    state = descend(lambda point: math.inf, POINTS[5], GRID)
    assert not state.wanted


@pytest.mark.parametrize("way", WAYS)
def test_ties_do_not_wander(way: str) -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    state = descend(lambda point: 1.0, start, GRID, way)
    assert state.best == start
    assert state.visited[0] == start
    assert set(state.visited) == {start, *neighbours(start, GRID)}


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


# --- 200 noisy surfaces ---------------------------------------------------------------------------------------------------

WIDE: dict[str, tuple[float, ...]] = {
    "wd": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
    "epochs": (1, 2, 4, 8, 16, 32, 64),
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
SPREAD = 0.003  # nats between seeds, as in small real runs


class Noisy:
    """A quasi-convex loss with a tilted valley between decay and rate, as the averaging window makes it, and noise."""

    def __init__(self, seed: int) -> None:
        self.source, self.seed = random.Random(seed), seed
        self.middle = [self.source.uniform(1, len(values) - 2) for values in WIDE.values()]
        self.scale = [self.source.uniform(0.1, 0.28) for _ in WIDE]
        self.tilt, self.power = self.source.uniform(0, 0.6), self.source.choice((0.7, 1.0, 1.5))
        self.asked: set[Point] = set()
        grid = itertools.product(*(range(len(values)) for values in WIDE.values()))
        self.best = min((self.at(places) for places in grid), key=self.true)

    def at(self, places: tuple[int, ...]) -> Point:
        wd, epochs, lr = (values[place] for values, place in zip(WIDE.values(), places, strict=True))
        return Point(lr=lr, epochs=int(epochs), wd=wd)

    def true(self, point: Point) -> float:
        x, y, z = (
            scale * (values.index(point.get(field)) - middle)
            for scale, middle, (field, values) in zip(self.scale, self.middle, WIDE.items(), strict=True)
        )
        return 4 + float((x * x + y * y + z * z + 2 * self.tilt * x * z) ** self.power)

    def measured(self, point: Point) -> float:
        self.asked.add(point)
        return self.true(point) + random.Random(f"{self.seed} {point}").gauss(0, SPREAD)

    def start(self) -> Point:
        """Up to one step off in each field, as the rule for the window and the next smaller size leave it."""
        places = [values.index(self.best.get(field)) for field, values in WIDE.items()]
        moved = [place + self.source.choice((-1, 0, 0, 1)) for place in places]
        ends = [len(values) - 1 for values in WIDE.values()]
        return self.at(tuple(min(max(place, 0), end) for place, end in zip(moved, ends, strict=True)))


@pytest.mark.parametrize(("way", "limit", "rounds_limit"), [("in turn", 1.5, 8.0), ("together", 2.2, 3.0)])
def test_noisy_surfaces_need_few_more_runs_than_a_star_around_the_optimum(
    way: str, limit: float, rounds_limit: float
) -> None:
    """Runs of all searches over those of an oracle that only certifies; every end is certified and near the optimum."""
    runs, oracle, rounds, regrets = [], [], 0, []
    for seed in range(200):
        surface = Noisy(seed)
        start, known = surface.start(), dict[Point, float]()
        while (state := descend(known.get, start, WIDE, way)).wanted:
            assert not state.certified
            known |= {point: surface.measured(point) for point in state.wanted}
            rounds += 1
        assert state.certified and state.best is not None
        assert set(neighbours(state.best, WIDE)) <= surface.asked == set(known)
        around = min(surface.true(point) for point in neighbours(state.best, WIDE))
        assert surface.true(state.best) < around + 4.5 * math.sqrt(2) * SPREAD  # no better one beyond noise
        regrets.append(surface.true(state.best) - surface.true(surface.best))
        runs.append(len(known))
        oracle.append(1 + len(neighbours(surface.best, WIDE)))
    assert sum(runs) / sum(oracle) < limit
    if way == "in turn":  # the default: for most surfaces, too
        assert sum(run <= 1.5 * star for run, star in zip(runs, oracle, strict=True)) > 100
    assert rounds / 200 < rounds_limit
    assert sorted(regrets)[190] < 2 * SPREAD


@pytest.mark.parametrize("way", WAYS)
def test_killed_anywhere_it_continues_and_two_tuners_agree(way: str) -> None:
    for seed in range(20):
        surface, source = Noisy(seed), random.Random(seed)
        start = surface.start()
        folder: dict[Point, float] = {}  # what both tuners see; a kill loses what was running and nothing else
        while (state := descend(folder.get, start, WIDE, way)).wanted:
            assert descend(folder.get, start, WIDE, way) == state
            for point in source.sample(state.wanted, source.randint(1, len(state.wanted))):
                folder[point] = surface.measured(point)
        alone = dict[Point, float]()
        while (other := descend(alone.get, start, WIDE, way)).wanted:
            alone |= {point: surface.measured(point) for point in other.wanted}
        assert other == state
        assert set(alone) == set(folder)


# --- further fields, certificates, gains ----------------------------------------------------------------------------------


def test_further_fields_are_searched_too() -> None:
    grid = {"lr": GRID["lr"], "dropout": (0.0, 0.1, 0.2)}
    start = Point(lr=0.001, epochs=4, wd=0.1, more=(("dropout", 0.0),))
    known: Surface = {}
    while (state := descend(known.get, start, grid)).wanted:
        known |= {point: abs(point.lr - 0.003) + abs(point.get("dropout") - 0.1) for point in state.wanted}
    assert state.best == Point(lr=0.003, epochs=4, wd=0.1, more=(("dropout", 0.1),))
    assert state.edges == ()


def test_noise_is_pooled_within_groups() -> None:
    # Variances 0.02 with 1 and 0.01 with 2 degrees of freedom: (0.02 + 0.02) / 3.
    found = pooled_noise([[1.0, 1.2], [2.0, 2.1, 2.2, math.inf], [5.0], []])
    assert found is not None and found.freedom == 3
    assert found.sd == pytest.approx(math.sqrt(0.04 / 3))
    assert pooled_noise([[1.0], [math.inf, 2.0]]) is None


def star(**changes: float | None) -> tuple[Surface, Point, dict[str, tuple[float, ...]]]:
    """Losses around a centre of 1.0 in wd and lr; None leaves a neighbour out."""
    grid = {"wd": GRID["wd"], "lr": GRID["lr"]}
    centre = Point(lr=0.003, epochs=4, wd=0.4)
    places = {"wd_down": ("wd", 0.1), "wd_up": ("wd", 1.6), "lr_down": ("lr", 0.001), "lr_up": ("lr", 0.01)}
    losses = {centre: 1.0}
    for name, (field, value) in places.items():
        loss = changes.get(name, 2.0)
        if loss is not None:
            losses[centre.at(field, value)] = loss
    return losses, centre, grid


def test_a_certificate_says_how_far_the_noise_reaches() -> None:
    losses, centre, grid = star(wd_up=1.02)
    state = descend(losses.get, centre, grid)
    quiet = certify(losses.get, state, grid, Noise(0.005, 4))
    assert str(quiet) == "all neighbours run, none better (none within noise)"
    loud = certify(losses.get, state, grid, Noise(0.01, 4))
    assert loud is not None and loud.ties == (centre.at("wd", 1.6),)
    assert str(loud) == "all neighbours run, none better (1 of 4 within noise)"
    assert "noise unknown" in str(certify(losses.get, state, grid))


def test_a_certificate_names_the_missing_neighbours() -> None:
    losses, centre, grid = star(wd_up=None, lr_down=None)
    found = certify(losses.get, descend(losses.get, centre, grid), grid)
    assert str(found) == "not run yet: wd 1.6, lr 0.001"
    assert certify(losses.get, NOT_STARTED, grid) is None


def test_a_convex_loss_gains_no_more_than_the_known_side_rises() -> None:
    losses, centre, grid = star(wd_up=None, wd_down=1.3)
    assert possible_gain(losses.get, descend(losses.get, centre, grid), grid) == pytest.approx(0.3)
    losses, centre, grid = star(wd_up=None, wd_down=None)
    assert possible_gain(losses.get, descend(losses.get, centre, grid), grid) is None
    losses, centre, grid = star()
    assert possible_gain(losses.get, descend(losses.get, centre, grid), grid) == 0.0


def test_the_quadratic_through_a_star_says_what_lies_between_the_points() -> None:
    # 1 + a (x - c)^2 - a c^2 falls a c^2 below its value at 0.
    a, c = 0.4, 0.25
    sides = {name: 1 + a * ((x - c) ** 2 - c * c) for name, x in (("wd_down", -1), ("wd_up", 1))}
    losses, centre, grid = star(**sides, lr_up=2.0, lr_down=2.0)
    assert between_points(losses.get, descend(losses.get, centre, grid), grid) == pytest.approx(a * c * c)


def test_the_limit_of_members() -> None:
    assert members_limit({k: 3.0 + 0.5 / k for k in (1, 2, 3)}) == pytest.approx(3.0)
    assert members_limit({1: 3.5, 2: 3.25}) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="two or more"):
        members_limit({1: 3.5})
