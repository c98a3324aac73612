"""What an optimizer does with pieces of matrices: it refuses them by a sentence, or steps their elements, never a vector.

A wrapper's part is played here: DeepSpeed puts one flat tensor for many parameters into a group, FSDP2 puts DTensors, FSDP1
and deepspeed.zero.Init give out flat parameters before the optimizer is built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from epochal.optim import AdEMAMix, Fira, Lion, Mars, Muon, Signum, Spectra
from epochal.optim.base import MatrixOptimizer

Make = Callable[[list[Parameter]], MatrixOptimizer]
MATRICES: dict[str, Make] = {
    "Muon": Muon,
    "Mars": Mars,
    "Spectra": lambda params: Spectra(params, 1e-2),
    "Fira": lambda params: Fira([{"params": params, "rank": 2, "alpha": 0.25}]),
}
ELEMENTWISE: dict[str, Make] = {"Lion": Lion, "Signum": Signum, "AdEMAMix": AdEMAMix}
matrices = pytest.mark.parametrize("name", MATRICES)
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def refused(name: str) -> pytest.RaisesExc[ValueError]:
    return pytest.raises(
        ValueError, match=rf"^{name} updates whole matrices, but .*; train with DDP or .* AdEMAMix\)\.$"
    )


@matrices
def test_a_flat_group_in_place_of_the_matrices_is_refused(name: str) -> None:
    """As `deepspeed.initialize(model=..., optimizer=Muon(...))` makes of it."""
    optimizer = MATRICES[name]([Parameter(values(4, 6)), Parameter(values(6, 4))])
    flat = Parameter(torch.zeros(48))
    flat.grad = torch.ones(48)
    optimizer.param_groups[0]["params"] = [flat]
    with refused(name):
        optimizer.step()
    assert not flat.any(), "nothing may have moved"


@matrices
def test_copies_of_an_optimizer_and_of_its_state_keep_what_was_settled(name: str) -> None:
    p = Parameter(values(4, 6))
    optimizer = MATRICES[name]([p])
    twin_p, twin = copy.deepcopy((p, optimizer))
    twin.load_state_dict(optimizer.state_dict())
    twin_p.grad = torch.ones_like(twin_p)
    twin.step()
    assert not torch.equal(p, twin_p)
    other = Parameter(values(4, 6))
    other.grad = torch.ones_like(other)
    twin.param_groups[0]["params"] = [other]
    with refused(name):
        twin.step()


@elementwise
def test_an_elementwise_optimizer_steps_a_flat_group(name: str) -> None:
    apart = [Parameter(values(4, 6)), Parameter(values(5))]
    flat = Parameter(torch.cat([p.detach().flatten() for p in apart]))
    separate, optimizer = ELEMENTWISE[name](apart), ELEMENTWISE[name]([Parameter(values(4, 6)), Parameter(values(5))])
    optimizer.param_groups[0]["params"] = [flat]
    for step in range(3):
        for i, p in enumerate(apart):
            p.grad = values(*p.shape, seed=10 * step + i + 1)
        flat.grad = torch.cat([p.grad.flatten() for p in apart if p.grad is not None])
        separate.step()
        optimizer.step()
    assert torch.allclose(flat, torch.cat([p.detach().flatten() for p in apart]), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "mark", [("_is_flat_param", True), ("ds_shape", torch.Size((4, 6)))], ids=["FSDP1", "zero.Init"]
)
@pytest.mark.parametrize("name", ["Muon", "Mars"])
def test_flat_parameters_are_refused_before_the_first_step(name: str, mark: tuple[str, object]) -> None:
    flat = Parameter(torch.zeros(24))
    setattr(flat, *mark)
    with refused(name):
        MATRICES[name]([flat])
    Lion([flat])


@pytest.fixture(scope="module")
def shard() -> Iterator[Callable[[Tensor], Parameter]]:
    """Make a parameter of which rank 0 of 2 holds the first half of the rows, in a group without other processes."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    mesh = init_device_mesh("cpu", (2,))

    def sharded(whole: Tensor) -> Parameter:
        rows = len(whole) // 2
        local = DTensor.from_local(whole[:rows].clone(), mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
        return Parameter(local)

    yield sharded
    dist.destroy_process_group()


@matrices
def test_a_matrix_of_fully_shard_is_refused(name: str, shard: Callable[[Tensor], Parameter]) -> None:
    """Whether `fully_shard` came before the optimizer was built, or put DTensors into its groups afterwards."""
    sharded = shard(values(4, 6))
    sharded.grad = shard(values(4, 6, seed=1)).data
    with refused(name):
        MATRICES[name]([sharded]).step()
    optimizer = MATRICES[name]([Parameter(values(4, 6))])
    optimizer.param_groups[0]["params"] = [sharded]
    with refused(name):
        optimizer.step()


@elementwise
def test_an_elementwise_optimizer_steps_the_rows_of_fully_shard(
    name: str, shard: Callable[[Tensor], Parameter]
) -> None:
    sharded, plain = shard(values(4, 6)), Parameter(values(4, 6)[:2])
    optimizers = [ELEMENTWISE[name]([p]) for p in (sharded, plain)]
    for step in range(3):
        gradient = values(4, 6, seed=step + 1)
        sharded.grad, plain.grad = shard(gradient).data, gradient[:2]
        for optimizer in optimizers:
            optimizer.step()
    assert isinstance(sharded, DTensor)
    assert torch.equal(sharded.to_local(), plain)
    # Tools that save sharded training look for DTensors of the whole shape in the state.
    for key, value in optimizers[0].state[sharded].items():
        assert value.ndim == 0 or (isinstance(value, DTensor) and value.shape == (4, 6)), key
