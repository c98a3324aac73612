"""What a GPU holds and sends, against sums that are easy by hand, and against what the exchange really sent."""

import pytest

from epochal.sharded_cost import PROFILES, cost_lines, sharded_cost


def test_one_gpu_holds_everything_and_sends_nothing() -> None:
    for profile in PROFILES:
        cost = sharded_cost(profile, 1, parameters=1000, matrix_elements=600)
        assert cost.sent == 0
        masters = 4000 if profile.startswith("zero") else 0
        assert cost.held == 1000 * (4 + 4 + 8) + masters


def test_sharding_ends_at_nothing_and_ddp_at_weights_and_gradients() -> None:
    held = {p: sharded_cost(p, 10**6, parameters=1000, matrix_elements=1000).held for p in PROFILES}
    assert held["ddp"] == pytest.approx(8000, rel=1e-3)
    assert held["zero2"] == pytest.approx(4000, rel=1e-2)
    assert held["zero3"] < 1 and held["fsdp2"] < 1


def test_the_exchange_of_two_processes_is_what_was_measured() -> None:
    """552 elements on two processes: 1,104 bytes a step, measured under ZeRO-3; broadcasts send 1,104 on average."""
    plain, matrices = (sharded_cost("zero3", 2, parameters=552, matrix_elements=m).sent for m in (0, 552))
    assert matrices - plain == 1104
    plain, matrices = (sharded_cost("ddp", 2, parameters=552, matrix_elements=m).sent for m in (0, 552))
    assert matrices - plain == 1104


def test_unknown_profiles_are_refused_and_a_table_has_a_line_for_each_number() -> None:
    with pytest.raises(ValueError, match="zero4"):
        sharded_cost("zero4", 8, parameters=1)
    lines = cost_lines("ic-1.4b", 1_400_000_000, 1_300_000_000)
    assert len(lines) == 7 and lines[-1].split()[0] == "1024"
