"""When the proof is due and what it makes of what it finds; no processes are needed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epochal.distributed.first_step_check import TOLERANCE, Before, ShardedUpdateCheck, clip_factor
from epochal.distributed.layout import Entry

NAN = float("nan")


class Optimizer:
    """Two matrices, of two owners, and a vector that is stepped in pieces."""

    rule: object = object()

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.1, "params": []}]
        shapes = [("big", (4, 4), 0), ("small", (2, 2), 0), ("other", (3, 3), 1), ("vector", (5,), None)]
        self.entries = [Entry(name, torch.empty(0), 0, torch.Size(shape), owner) for name, shape, owner in shapes]
        self.matrices, self.stepped = self.entries[:3], list[str]()
        self.numbers = [{"lr": 0.5, "weight_decay": 0.25}]


def made(error: float = 0.0, allowed: float = TOLERANCE) -> tuple[Any, ShardedUpdateCheck, list[int]]:
    """One process of a sharded run whose proof looks at numbers and finds `error`."""
    processes = SimpleNamespace(
        optimizer=Optimizer(), backend="zero2", world=1, is_main=True, norm=torch.tensor(1.0), gather=lambda v: [v]
    )
    looked: list[int] = []

    class Told(ShardedUpdateCheck):
        def _look(self, number: int) -> Any:
            looked.append(number)
            return number

        def _compare(self, before: Any) -> tuple[float, float]:
            return (error, allowed) if before == 1 else (0.0, TOLERANCE)

    return processes, Told(processes, "r"), looked


def step(processes: Any, proof: ShardedUpdateCheck, *, matrices: int = 3, norm: float = 1.0) -> None:
    with proof:
        processes.norm = torch.tensor(norm)
        processes.optimizer.stepped.extend("m" * matrices)


def test_it_looks_once_at_the_smallest_of_each_owner_at_the_first_step_that_moves() -> None:
    processes, proof, looked = made()
    processes.optimizer.param_groups[0]["lr"] = 0.0
    step(processes, proof)
    assert looked == [] and proof.error is None, "a step that moves nothing proves nothing"
    processes.optimizer.param_groups[0]["lr"] = 0.1
    for norm in (NAN, float("inf")):
        step(processes, proof, matrices=0, norm=norm)  # no optimizer steps then
        assert looked == [1, 2, 3] and proof.error is None
        looked.clear()
    step(processes, proof)
    assert looked == [1, 2, 3] and proof.error == 0.0
    step(processes, proof)
    assert looked == [1, 2, 3]


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
def test_a_difference_and_a_matrix_too_few_or_too_many_stop_the_run(
    error: float, allowed: float, matrices: int, sound: bool
) -> None:
    processes, proof, _ = made(error, allowed)
    if sound:
        step(processes, proof, matrices=matrices)
    else:
        with pytest.raises(ValueError, match=rf"Run 'r': \w+ treats {matrices} matrices .* but 3 are matrices"):
            step(processes, proof, matrices=matrices)


def test_one_process_steps_with_todays_numbers_and_the_clipped_gradient() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])
    processes, proof, _ = made()
    processes.norm, processes.clip_norm = torch.tensor(5.0), 1.0

    def fresh(name: str, value: torch.Tensor) -> Any:
        parameter = torch.nn.Parameter(value.clone())
        return torch.optim.SGD([parameter], lr=9.0, weight_decay=9.0), parameter

    processes.fresh_optimizer = fresh
    found = proof._alone(Before(1, processes.optimizer.entries[1], weight, gradient, {}))
    torch.testing.assert_close(found, weight - 0.5 * (gradient / 5 + 0.25 * weight))
    assert clip_factor(torch.tensor(0.5), 1.0) == 1.0
