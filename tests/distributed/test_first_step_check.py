"""When the check of the first step runs, and which differences stop a run; without processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epochal.distributed.first_step_check import TOLERANCE, Before, ShardedUpdateCheck, clip_factor
from epochal.distributed.layout import Entry
from epochal.optim import Muon

NAN = float("nan")


class Optimizer:
    """Three matrices with two owners, and a vector that is stepped in pieces."""

    rule: object = object()

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.1, "params": []}]
        shapes = [("big", (4, 4), 0), ("small", (2, 2), 0), ("other", (3, 3), 1), ("vector", (5,), None)]
        self.entries = [Entry(name, torch.empty(0), 0, torch.Size(shape), owner) for name, shape, owner in shapes]
        self.matrices, self.stepped = self.entries[:3], list[str]()
        self.hyperparameters = [{"lr": 0.5, "weight_decay": 0.25}]


def make_check(error: float = 0.0, allowed: float = TOLERANCE) -> tuple[Any, ShardedUpdateCheck, list[int]]:
    """One process of a sharded run, and a check whose comparison gives `error`; with the numbers it recorded."""
    processes = SimpleNamespace(
        optimizer=Optimizer(), backend="zero2", world=1, is_main=True, norm=torch.tensor(1.0), gather=lambda v: [v]
    )
    recorded: list[int] = []

    class Scripted(ShardedUpdateCheck):
        def _record(self, number: int) -> Any:
            recorded.append(number)
            return number

        def _compare(self, before: Any) -> tuple[float, float]:
            return (error, allowed) if before == 1 else (0.0, TOLERANCE)

    return processes, Scripted(processes, "r"), recorded


def step(processes: Any, check: ShardedUpdateCheck, *, matrices: int = 3, norm: float = 1.0) -> None:
    with check:
        processes.norm = torch.tensor(norm)
        processes.optimizer.stepped.extend("m" * matrices)


def test_the_smallest_of_each_owner_is_checked_once_at_the_first_step_that_moves_weights() -> None:
    processes, check, recorded = make_check()
    processes.optimizer.param_groups[0]["lr"] = 0.0
    step(processes, check)
    assert recorded == [] and check.error is None, "a step that moves no weight is not checked"
    processes.optimizer.param_groups[0]["lr"] = 0.1
    for norm in (NAN, float("inf")):
        step(processes, check, matrices=0, norm=norm)  # no optimizer steps on such a gradient
        assert recorded == [1, 2, 3] and check.error is None
        recorded.clear()
    step(processes, check)
    assert recorded == [1, 2, 3] and check.error == 0.0
    step(processes, check)
    assert recorded == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "allowed", "matrices", "sound"),
    [
        (0.9 * TOLERANCE, TOLERANCE, 3, True),
        (1.1 * TOLERANCE, TOLERANCE, 3, False),
        (1.1 * TOLERANCE, 2 * TOLERANCE, 3, True),
        (NAN, TOLERANCE, 3, False),
        (0.0, TOLERANCE, 2, False),
        (0.0, TOLERANCE, 4, False),
    ],
)
def test_a_difference_or_a_wrong_number_of_matrices_stops_the_run(
    error: float, allowed: float, matrices: int, sound: bool
) -> None:
    processes, check, _ = make_check(error, allowed)
    if sound:
        step(processes, check, matrices=matrices)
    else:
        with pytest.raises(
            ValueError, match=rf"Run 'r' failed .* stepped {matrices} parameters .* Expected 3 matrices"
        ):
            step(processes, check, matrices=matrices)


def test_one_process_steps_with_the_current_hyperparameters_and_the_clipped_gradient() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    processes, check, _ = make_check()
    processes.norm, processes.clip_norm = torch.tensor(5.0), 1.0

    def fresh(name: str, value: torch.Tensor) -> Any:
        parameter = torch.nn.Parameter(value.clone())
        return torch.optim.SGD([parameter], lr=9.0, weight_decay=9.0), parameter

    processes.fresh_optimizer = fresh
    stepped = check._step_alone(Before(1, processes.optimizer.entries[1], weight, gradient, {}))
    torch.testing.assert_close(stepped, weight - 0.5 * (gradient / 5 + 0.25 * weight))
    assert clip_factor(torch.tensor(0.5), 1.0) == 1.0


def compared(weight: torch.Tensor, gradient: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """What the check says about a matrix that Muon moved from `weight` to `after`: (difference, allowed)."""
    processes, check, _ = make_check()
    processes.optimizer.rule = Muon([torch.nn.Parameter(weight.clone())])
    processes.optimizer.hyperparameters = [{"lr": 0.1, "weight_decay": 0.0}]
    processes.norm, processes.clip_norm, processes.rank = torch.tensor(1.0), 9.0, 0
    processes.whole_weight = lambda parameter: after

    def fresh(name: str, value: torch.Tensor) -> Any:
        parameter = torch.nn.Parameter(value.clone())
        return Muon([parameter]), parameter

    processes.fresh_optimizer = fresh
    entry = Entry("small", torch.empty(0), 0, weight.shape, 0)
    return ShardedUpdateCheck._compare(check, Before(1, entry, weight, gradient, {}))


def stepped(weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    params = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.clone()
    Muon(params, lr=0.1, weight_decay=0.0).step()
    return [p.detach() for p in params]


def test_products_of_a_stack_may_round_differently_and_a_matrix_in_pieces_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU multiplies one matrix and a stack in different kernels; here a stack's sums are split and rounded twice."""
    generator = torch.Generator().manual_seed(0)
    weights, gradients = ([torch.randn(48, 64, generator=generator) for _ in range(3)] for _ in range(2))
    plain = torch.baddbmm

    def split(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float, alpha: float = 1.0) -> torch.Tensor:
        if len(a) == 1:
            return plain(c, a, b, beta=beta, alpha=alpha)
        half = a.shape[2] // 2
        first = plain(c, a[..., :half], b[:, :half], beta=beta, alpha=alpha)
        return plain(first, a[..., half:], b[:, half:], beta=1.0, alpha=alpha)

    monkeypatch.setattr(torch, "baddbmm", split)
    difference, allowed = compared(weights[0], gradients[0], stepped(weights, gradients)[0])
    assert TOLERANCE < difference <= allowed, (difference, allowed)
    pieces = torch.cat(stepped(list(weights[0].chunk(2)), list(gradients[0].chunk(2))))
    difference, allowed = compared(weights[0], gradients[0], pieces)
    assert difference > 2 * allowed, (difference, allowed)
