"""Speeds of models compare on a machine whose other programs take turns with ours."""

import pytest

from epochal.training.speed import steady, training_speeds


def test_a_step_that_waited_for_others_does_not_make_a_model_slow() -> None:
    # The small model waited in three of four steps, the large one in none; alone they take 1 and 4 seconds.
    found = steady({"small": [1.0, 9.0, 9.0, 9.0], "large": [4.0, 4.0, 4.0, 4.0]})
    assert found["large"] / found["small"] == pytest.approx(4.0)
    assert 4 * sum(found.values()) == pytest.approx(28.0 + 16.0), "the time that others took is part of the price"


def test_a_larger_model_is_slower() -> None:
    speeds = training_speeds(["w6", "w96"], vocab_size=64, sequence_length=32, sequences=4, threads=1)
    assert speeds["w6"] > speeds["w96"] > 0
