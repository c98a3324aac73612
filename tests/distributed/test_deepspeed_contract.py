"""What `epochal.distributed.sharding` assumes about DeepSpeed, one test for each assumption.

An upgrade of DeepSpeed that breaks an assumption fails here. The optimizer only records what it receives. Every element of
the model has a different value, which shows where it is in a shard.
"""

from collections.abc import Callable
from typing import Any

import contract
import pytest
import torch
import toy
from ranks import Group

Recorded = Callable[[str], list[dict[str, Any]]]
WORLD = 2
STAGES = ["zero1", "zero2", "zero3", "zero3-two-sub-groups"]
ELEMENTS = {name: p.detach() for name, p in contract.model_of_distinct_values().model.named_parameters()}
PLACES = {
    value: (name, index) for name, weight in ELEMENTS.items() for index, value in enumerate(weight.flatten().tolist())
}


@pytest.fixture(scope="module")
def recorded(processes: Callable[[int], Group], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A function from a stage to the recordings of two processes, made once."""
    by_stage: dict[str, list[dict[str, Any]]] = {}

    def get(stage: str) -> list[dict[str, Any]]:
        if stage not in by_stage:
            preset = stage
            if stage == "zero3-two-sub-groups":
                preset = toy.write_preset(tmp_path_factory.mktemp("preset"), "zero3", sub_group_size=200)
            by_stage[stage] = processes(WORLD).run("contract:record", preset)
        for rank in by_stage[stage]:
            assert rank["stage"] == int(stage[4]) and rank["keeps_the_optimizer"], "ZeRO is not active"
        return by_stage[stage]

    return get


def shards(rank: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for call in rank["calls"] for shard in call]


def held(shard: dict[str, Any]) -> list[tuple[str, int] | None]:
    """The (parameter, index) at each position of a shard; None is padding."""
    return [PLACES.get(value) for value in shard["values"].tolist()]


@pytest.mark.parametrize("stage", STAGES)
def test_step_is_called_once_for_each_shard_in_the_same_order_everywhere(recorded: Recorded, stage: str) -> None:
    orders = [[shard["number"] for shard in shards(rank)] for rank in recorded(stage)]
    assert orders[0] == orders[1]
    if stage.startswith("zero3"):
        assert all(len(call) == 1 for call in recorded(stage)[0]["calls"]), "one shard a call"
    assert sorted(set(orders[0])) == [0, 1]
    assert (len(orders[0]) > 2) == (stage == "zero3-two-sub-groups"), "a group is one shard, or one for each sub-group"


@pytest.mark.parametrize("stage", STAGES)
def test_a_shard_is_flat_and_has_a_gradient_of_its_size(recorded: Recorded, stage: str) -> None:
    for rank in recorded(stage):
        for shard in shards(rank):
            assert len(shard["shape"]) == 1 and shard["gradient_shape"] == shard["shape"]
            assert shard["values"].dtype == shard["gradient"].dtype == torch.float32


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_is_averaged_unscaled_and_clipped(recorded: Recorded, stage: str) -> None:
    alone = contract.model_of_distinct_values()
    for part in toy.batch(0).chunk(contract.PARTS):
        (alone(part) / (toy.ROWS * 8)).backward()
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), contract.CLIP)
    assert norm > 2 * contract.CLIP, "clipping must act"
    expected = {name: p.grad.flatten() for name, p in alone.model.named_parameters() if p.grad is not None}
    seen = 0
    for rank in recorded(stage):
        for shard in shards(rank):
            for place, value in zip(held(shard), shard["gradient"].tolist(), strict=True):
                if place is not None:
                    assert value == pytest.approx(float(expected[place[0]][place[1]]), rel=1e-4, abs=1e-7), place
                    seen += 1
    assert seen == len(PLACES)


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_keep_their_identity_and_groups_their_keys(recorded: Recorded, stage: str) -> None:
    for rank in recorded(stage):
        assert rank["same_objects"]
        for shard in shards(rank):
            whole = {toy.is_matrix(place[0]) for place in held(shard) if place is not None}
            assert whole <= {shard["number"] == 0}, "a group's own key says what is in it"


@pytest.mark.parametrize("stage", STAGES)
def test_every_element_is_held_once_where_the_layout_expects_it(recorded: Recorded, stage: str) -> None:
    ranks = recorded(stage)
    everything = [place for rank in ranks for shard in shards(rank) for place in held(shard) if place is not None]
    assert sorted(everything) == sorted(PLACES.values())
    for number, rank in enumerate(ranks):
        for shard in shards(rank):
            for offset, place in enumerate(held(shard)):
                if place is None:
                    continue
                name, index = place
                if stage.startswith("zero3"):  # the r-th equal slice of each parameter
                    assert index // -(-ELEMENTS[name].numel() // WORLD) == number
                else:  # the r-th equal part of one buffer, of which parameters are views
                    assert rank["offsets"][name] + index == number * len(shard["values"]) + offset
    if stage.startswith("zero3"):  # and one after the other, in the order of the group
        for shard in shards(ranks[0]):
            order = [place for place in held(shard) if place is not None]
            names = list(dict.fromkeys(name for name, _ in order))
            assert names == [name for name in ELEMENTS if name in names]
            assert order == sorted(order, key=lambda place: (names.index(place[0]), place[1]))


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_is_taken_at_construction(recorded: Recorded, stage: str) -> None:
    assert [rank["at_construction"] for rank in recorded(stage)] == [0] * WORLD


def test_groups_are_empty_between_two_calls_under_zero3(recorded: Recorded) -> None:
    """So parameters must not be identified by their position in a group."""
    assert recorded("zero3")[0]["parameters_between"] == [0, 0]
    assert recorded("zero2")[0]["parameters_between"] == [1, 1]


def test_the_default_of_gradient_clipping_is_one_and_not_off() -> None:
    """So `deepspeed_config` always sets it."""
    from deepspeed.runtime.config import get_gradient_clipping

    assert get_gradient_clipping({}) == 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_replaced_norm_function_is_used_in_float64(recorded: Recorded, stage: str) -> None:
    for rank in recorded(stage):
        assert rank["norm"].dtype == torch.float64
        assert float(rank["norm"]) == pytest.approx(float(torch.linalg.vector_norm(rank["norms"])), rel=1e-15)
