"""Learning rates: 0, peak, 0, exactly."""

import math

import pytest

from epochal.training.schedule import decay_multiplier, multiplier


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.01), (6400, 0.01), (1000, 0.1)])
def test_the_rate_is_zero_then_the_peak_then_zero(steps: int, warmup: float) -> None:
    values = [multiplier(step, steps, warmup=warmup) for step in range(steps + 1)]
    rise = round(steps * warmup)
    assert values[0] == 0.0
    assert values[rise] == 1.0
    assert values[steps] == 0.0
    assert max(values) == 1.0
    assert values[: rise + 1] == [step / rise for step in range(rise + 1)]
    assert all(after <= before for before, after in zip(values[rise:], values[rise + 1 :], strict=False))


def test_the_cosine_has_its_closed_form() -> None:
    assert multiplier(505, 1000, warmup=0.01) == pytest.approx(0.5, abs=1e-15)
    for step in range(10, 1001):
        expected = math.cos(0.5 * math.pi * (step - 10) / 990) ** 2
        assert multiplier(step, 1000, warmup=0.01) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_the_first_step_is_the_peak() -> None:
    assert multiplier(0, 10, warmup=0.0) == 1.0


def test_decay_in_antiphase_rises_as_the_rate_falls_and_averages_to_one_over_a_cosine() -> None:
    rates = [multiplier(step, 1000, warmup=0.0) for step in range(1001)]
    values = [decay_multiplier(rate, kind="antiphase") for rate in rates]
    assert (values[0], values[-1]) == (0.5, 1.5)
    assert values == sorted(values)
    assert sum(values) / len(values) == pytest.approx(1.0, abs=1e-3)


def test_constant_decay_does_not_change_and_another_kind_is_refused() -> None:
    assert [decay_multiplier(rate, kind="constant") for rate in (0.0, 0.25, 1.0)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="got 'cosine'"):
        decay_multiplier(0.5, kind="cosine")
