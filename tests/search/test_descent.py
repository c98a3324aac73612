"""Coordinate descent is a pure function of the results and stops only with a certificate."""

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
    CoordinateDescent,
    Descent,
    Noise,
    between_points,
    certify,
    descend,
    members_limit,
    neighbors,
    pooled_noise,
    possible_gain,
)

GRID: dict[str, tuple[float, ...]] = {"lr": (0.001, 0.003, 0.01), "epochs": (2, 4, 8, 16), "wd": (0.1, 0.4, 1.6, 6.4)}
POINTS = [Point(lr=lr, epochs=int(e), wd=wd) for lr, e, wd in itertools.product(*GRID.values())]

Surface = dict[Point, float]


def bowl(seed: int) -> Surface:
    """A quasi-convex surface: a monotone function of a weighted distance to some grid point, with no ties."""
    source = random.Random(seed)
    center = [source.uniform(-0.5, len(values) - 0.5) for values in GRID.values()]
    scales = [source.uniform(0.3, 3.0) for _ in GRID]
    power = source.choice((0.5, 1.0, 2.0))

    def loss(point: Point) -> float:
        place = [values.index(getattr(point, field)) for field, values in GRID.items()]
        squares = [s * (x - c) ** 2 for s, x, c in zip(scales, place, center, strict=True)]
        return 3.0 + sum(squares) ** power

    return {point: loss(point) for point in POINTS}


def noise(seed: int) -> Surface:
    source = random.Random(seed)
    return {point: source.choice((math.inf, source.random(), source.random())) for point in POINTS}


def search(
    surface: Surface, start: Point, choose: Callable[[tuple[Point, ...]], list[Point]], mode: str = "sequential"
) -> tuple[Descent, Surface]:
    """Run a whole search, giving results for the wanted points that `choose` picks each time."""
    known: Surface = {}
    for _ in range(len(POINTS) + 1):
        state = descend(known.get, start, GRID, mode)
        if not state.wanted:
            return state, known
        assert not state.certified
        for point in choose(state.wanted):
            known[point] = surface[point]
    raise AssertionError("the search does not end")


def is_minimum(surface: Surface, best: Point) -> bool:
    return all(surface[best] <= surface[point] for point in neighbors(best, GRID))


MODES = ("sequential", "parallel")


@given(st.integers(0, 10**6), st.sampled_from(POINTS), st.sampled_from(MODES))
@settings(max_examples=100, deadline=None)
def test_a_bowl_is_searched_to_its_minimum(seed: int, start: Point, mode: str) -> None:
    surface = bowl(seed)
    state, known = search(surface, start, list, mode)
    assert state.certified
    assert state.best is not None
    assert is_minimum(surface, state.best)
    assert set(neighbors(state.best, GRID)) <= set(known)
    # A separable bowl has one such point: the minimum of the whole grid.
    assert surface[state.best] == min(surface.values())


@given(st.integers(0, 10**6), st.sampled_from(POINTS), st.integers(0, 10**6), st.sampled_from(MODES))
@settings(max_examples=100, deadline=None)
def test_every_search_ends_and_ignores_the_order_of_results(seed: int, start: Point, order: int, mode: str) -> None:
    surface, source = noise(seed), random.Random(order)
    batched, known = search(surface, start, list, mode)
    one_by_one, known_slowly = search(surface, start, lambda wanted: [source.choice(wanted)], mode)
    assert batched == one_by_one
    assert known == known_slowly
    assert set(batched.visited) == set(known)
    assert batched.best is not None
    if math.isfinite(surface[batched.best]):
        assert is_minimum(surface, batched.best)


def test_parallel_mode_starts_with_all_neighbors() -> None:
    start = POINTS[0]
    state = descend(lambda point: None, start, GRID, "parallel")
    assert state.best is None
    assert not state.certified
    assert set(state.wanted) == {start, *neighbors(start, GRID)}
    assert len(state.wanted) == 4


def test_sequential_mode_submits_neighbors_together_only_for_the_certificate() -> None:
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
        [(0.003, 4, 0.4), (0.01, 4, 0.4)],  # the start and its first neighbor
        [(0.001, 4, 0.4)],  # closes lr
        [(0.003, 8, 0.4)],  # better: the center moves
        [(0.003, 8, 1.6)],  # wd is still open; better again
        [(0.003, 8, 6.4)],  # one more step in the same direction
        [(0.01, 8, 1.6), (0.001, 8, 1.6), (0.003, 16, 1.6), (0.003, 4, 1.6)],  # missing for the certificate
    ]
    assert state.certified and state.best == Point(lr=0.003, epochs=8, wd=1.6)


def test_the_center_moves_when_the_last_result_of_a_round_arrives() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    search = CoordinateDescent(start, GRID, "sequential")
    above = start.at("lr", 0.01)
    assert search.ask() == [start, above]
    search.tell(above, 1.0)
    assert (search.best, search.center, search.ask()) == (above, start, [start])
    search.tell(start, 2.0)
    assert (search.center, search.direction, search.open_fields) == (above, ("lr", 1), {"epochs", "wd"})
    assert search.ask() == [above.at("epochs", 8)]


@pytest.mark.parametrize("mode", MODES)
def test_no_certificate_without_every_neighbor(mode: str) -> None:
    for seed in range(30):
        surface = bowl(seed)
        state, known = search(surface, POINTS[-1], list, mode)
        best = state.best
        assert best is not None
        for left_out in neighbors(best, GRID):
            partial = {point: loss for point, loss in known.items() if point != left_out}
            assert not descend(partial.get, POINTS[-1], GRID, mode).certified


def test_the_best_point_of_an_unfinished_round_is_reported() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    better = neighbors(start, GRID)[0]
    state = descend({start: 2.0, better: 1.0}.get, start, GRID, "parallel")
    assert state.best == better
    assert not state.certified
    assert better not in state.wanted
    assert set(state.wanted) == set(neighbors(start, GRID)) - {better}


def test_a_diverged_neighbor_counts_as_worse() -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    losses = {start: 2.0, **dict.fromkeys(neighbors(start, GRID), math.inf)}
    state = descend(losses.get, start, GRID)
    assert state.certified
    assert state.best == start


def test_the_center_leaves_a_diverged_start() -> None:
    start = Point(lr=0.01, epochs=4, wd=0.4)
    calm = Point(lr=0.003, epochs=4, wd=0.4)
    losses = {start: math.inf, **dict.fromkeys(neighbors(start, GRID), math.inf), calm: 3.0}
    state = descend(losses.get, start, GRID, "parallel")
    assert state.best == calm
    assert set(state.wanted) == set(neighbors(calm, GRID)) - {start}


def test_a_search_in_which_everything_diverged_ends() -> None:
    state = descend(lambda point: math.inf, POINTS[5], GRID)
    assert not state.wanted


@pytest.mark.parametrize("mode", MODES)
def test_the_center_does_not_move_to_a_tie(mode: str) -> None:
    start = Point(lr=0.003, epochs=4, wd=0.4)
    state = descend(lambda point: 1.0, start, GRID, mode)
    assert state.best == start
    assert state.visited[0] == start
    assert set(state.visited) == {start, *neighbors(start, GRID)}


def test_edges_are_the_fields_whose_grid_ends_at_the_best_point() -> None:
    corner = Point(lr=0.001, epochs=16, wd=0.4)
    surface = {point: float(point != corner) for point in POINTS}
    certificate = certify(surface.get, descend(surface.get, corner, GRID), GRID)
    assert certificate is not None and certificate.edges == ("lr", "epochs")
    assert str(certificate).endswith("; lr, epochs at the end of the grid")
    # A field with one grid value is fixed, not at an edge.
    narrow = {"lr": (0.01,), "wd": GRID["wd"]}
    state = descend(lambda point: 1.0, Point(lr=0.01, epochs=3, wd=0.4), narrow)
    certificate = certify(lambda point: 1.0, state, narrow)
    assert certificate is not None and certificate.edges == ()
    assert all(point.epochs == 3 for point in state.visited)


def test_a_descent_goes_on_from_a_better_known_run() -> None:
    """A run that another recipe made differs in two fields, so no neighbor leads there; its own neighbors are run next."""
    minimum, elsewhere = Point(lr=0.003, epochs=8, wd=0.4), Point(lr=0.003, epochs=16, wd=1.6)
    losses = dict.fromkeys(POINTS, 5.0) | {minimum: 4.0, elsewhere: 3.9}
    alone = descend(losses.get, minimum, GRID)
    assert alone.certified and alone.best == minimum
    known = {point: losses[point] for point in (minimum, *neighbors(minimum, GRID), elsewhere)}
    search = descend(known.get, minimum, GRID, known=[elsewhere])
    assert search.best == elsewhere and not search.certified
    assert set(search.wanted) <= set(neighbors(elsewhere, GRID)) and minimum in search.visited
    assert descend(losses.get, minimum, GRID, known=[elsewhere]).certified
    off = [Point(lr=0.003, epochs=32, wd=1.6), Point(lr=0.003, epochs=16, wd=1.6, more=(("dropout", 0.1),))]
    far = known | dict.fromkeys(off, 1.0)
    assert descend(far.get, minimum, GRID, known=off).best == minimum, "a descent stays on its grid"


def test_a_start_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"start wd 0.2 is not on its grid"):
        descend(lambda point: None, Point(lr=0.01, epochs=4, wd=0.2), GRID)


def test_the_decay_for_a_window_is_rounded_to_the_grid() -> None:
    # tau 0.5 epochs at lr 0.01 and 50 steps an epoch: wd = 1 / (0.5 * 0.01 * 50) = 4.
    assert decay_for_window(0.5, lr=0.01, steps_per_epoch=50, grid=(0.0, 0.1, 1.6, 3.2, 6.4)) == 3.2


# --- 200 noisy surfaces ---------------------------------------------------------------------------------------------------

WIDE: dict[str, tuple[float, ...]] = {
    "wd": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
    "epochs": (1, 2, 4, 8, 16, 32, 64),
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
SPREAD = 0.003  # nats between seeds, as in small runs


class NoisySurface:
    """A quasi-convex loss with a tilted valley between decay and rate, plus seed noise."""

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
        """Up to one step off in each field, like a start from the window rule or the next smaller size."""
        places = [values.index(self.best.get(field)) for field, values in WIDE.items()]
        moved = [place + self.source.choice((-1, 0, 0, 1)) for place in places]
        ends = [len(values) - 1 for values in WIDE.values()]
        return self.at(tuple(min(max(place, 0), end) for place, end in zip(moved, ends, strict=True)))


@pytest.mark.parametrize(("mode", "limit", "rounds_limit"), [("sequential", 1.5, 8.0), ("parallel", 2.2, 3.0)])
def test_noisy_surfaces_cost_little_more_than_certifying_a_known_optimum(
    mode: str, limit: float, rounds_limit: float
) -> None:
    """Compare with an oracle that only certifies the optimum; every search ends certified and near the optimum."""
    runs, oracle, rounds, regrets = [], [], 0, []
    for seed in range(200):
        surface = NoisySurface(seed)
        start, known = surface.start(), dict[Point, float]()
        while (state := descend(known.get, start, WIDE, mode)).wanted:
            assert not state.certified
            known |= {point: surface.measured(point) for point in state.wanted}
            rounds += 1
        assert state.certified and state.best is not None
        assert set(neighbors(state.best, WIDE)) <= surface.asked == set(known)
        around = min(surface.true(point) for point in neighbors(state.best, WIDE))
        assert surface.true(state.best) < around + 4.5 * math.sqrt(2) * SPREAD  # no better one beyond noise
        regrets.append(surface.true(state.best) - surface.true(surface.best))
        runs.append(len(known))
        oracle.append(1 + len(neighbors(surface.best, WIDE)))
    assert sum(runs) / sum(oracle) < limit
    if mode == "sequential":  # also for most single surfaces
        assert sum(run <= 1.5 * star for run, star in zip(runs, oracle, strict=True)) > 100
    assert rounds / 200 < rounds_limit
    assert sorted(regrets)[190] < 2 * SPREAD


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_search_ends_like_an_uninterrupted_one(mode: str) -> None:
    for seed in range(20):
        surface, source = NoisySurface(seed), random.Random(seed)
        start = surface.start()
        folder: dict[Point, float] = {}  # results that survive each interruption
        while (state := descend(folder.get, start, WIDE, mode)).wanted:
            assert descend(folder.get, start, WIDE, mode) == state
            for point in source.sample(state.wanted, source.randint(1, len(state.wanted))):
                folder[point] = surface.measured(point)
        alone = dict[Point, float]()
        while (other := descend(alone.get, start, WIDE, mode)).wanted:
            alone |= {point: surface.measured(point) for point in other.wanted}
        assert other == state
        assert set(alone) == set(folder)


# --- further fields, certificates, gains ----------------------------------------------------------------------------------


def test_additional_fields_are_searched() -> None:
    grid = {"lr": GRID["lr"], "dropout": (0.0, 0.1, 0.2)}
    start = Point(lr=0.001, epochs=4, wd=0.1, more=(("dropout", 0.0),))
    known: Surface = {}
    while (state := descend(known.get, start, grid)).wanted:
        known |= {point: abs(point.lr - 0.003) + abs(point.get("dropout") - 0.1) for point in state.wanted}
    assert state.best == Point(lr=0.003, epochs=4, wd=0.1, more=(("dropout", 0.1),))


def test_noise_is_pooled_within_groups() -> None:
    # Variances 0.02 with 1 and 0.01 with 2 degrees of freedom: (0.02 + 0.02) / 3.
    pooled = pooled_noise([[1.0, 1.2], [2.0, 2.1, 2.2, math.inf], [5.0], []])
    assert pooled is not None and pooled.freedom == 3
    assert pooled.sd == pytest.approx(math.sqrt(0.04 / 3))
    assert pooled_noise([[1.0], [math.inf, 2.0]]) is None


def star(**changes: float | None) -> tuple[Surface, Point, dict[str, tuple[float, ...]]]:
    """Losses around a center of 1.0 in wd and lr; None leaves a neighbor out."""
    grid = {"wd": GRID["wd"], "lr": GRID["lr"]}
    center = Point(lr=0.003, epochs=4, wd=0.4)
    places = {"wd_down": ("wd", 0.1), "wd_up": ("wd", 1.6), "lr_down": ("lr", 0.001), "lr_up": ("lr", 0.01)}
    losses = {center: 1.0}
    for name, (field, value) in places.items():
        loss = changes.get(name, 2.0)
        if loss is not None:
            losses[center.at(field, value)] = loss
    return losses, center, grid


def test_a_certificate_counts_the_neighbors_within_noise() -> None:
    losses, center, grid = star(wd_up=1.02)
    state = descend(losses.get, center, grid)
    quiet = certify(losses.get, state, grid, Noise(0.005, 4))
    assert str(quiet) == "all neighbors run, none better (none within noise)"
    loud = certify(losses.get, state, grid, Noise(0.01, 4))
    assert loud is not None and loud.ties == (center.at("wd", 1.6),)
    assert str(loud) == "all neighbors run, none better (1 of 4 within noise)"
    assert "noise unknown" in str(certify(losses.get, state, grid))


def test_a_certificate_names_the_missing_neighbors() -> None:
    losses, center, grid = star(wd_up=None, lr_down=None)
    certificate = certify(losses.get, descend(losses.get, center, grid), grid)
    assert str(certificate) == "not run yet: wd 1.6, lr 0.001"
    assert certify(losses.get, NOT_STARTED, grid) is None


def test_the_possible_gain_is_the_rise_on_the_other_side() -> None:
    losses, center, grid = star(wd_up=None, wd_down=1.3)
    assert possible_gain(losses.get, descend(losses.get, center, grid), grid) == pytest.approx(0.3)
    losses, center, grid = star(wd_up=None, wd_down=None)
    assert possible_gain(losses.get, descend(losses.get, center, grid), grid) is None
    losses, center, grid = star()
    assert possible_gain(losses.get, descend(losses.get, center, grid), grid) == 0.0


def test_the_gain_between_points_is_that_of_the_quadratic() -> None:
    # 1 + a (x - c)^2 - a c^2 falls a c^2 below its value at 0.
    a, c = 0.4, 0.25
    sides = {name: 1 + a * ((x - c) ** 2 - c * c) for name, x in (("wd_down", -1), ("wd_up", 1))}
    losses, center, grid = star(**sides, lr_up=2.0, lr_down=2.0)
    assert between_points(losses.get, descend(losses.get, center, grid), grid) == pytest.approx(a * c * c)


def test_the_limit_of_members_is_that_of_the_law() -> None:
    assert members_limit({k: 3.0 + 0.5 / k for k in (1, 2, 3)}) == pytest.approx(3.0)
    assert members_limit({1: 3.5, 2: 3.25}) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="two or more"):
        members_limit({1: 3.5})
