"""The rules of `epochal init`: they are monotone, fit the time, and follow the published laws."""

import pytest

from epochal.search.regime import Text, batch_tokens, cautions, choose, decay, expected_loss, vocabulary

SIZES = {"w16": 45_000, "w32": 110_000, "w64": 310_000, "w96": 600_000, "w128": 1_000_000, "w192": 2_300_000}
ONE = {"w16": 60e3, "w32": 40e3, "w64": 25e3, "w96": 14e3, "w128": 8e3, "w192": 3.7e3}
SPEEDS = {1: ONE, 2: {model: 0.7 * speed for model, speed in ONE.items()}}


def text(tokens: int, documents: int = 500) -> Text:
    return Text(documents=documents, tokens=tokens, bytes=3 * tokens)


def test_the_vocabulary_grows_with_the_root_of_the_text_within_bounds() -> None:
    assert vocabulary(4_600_000) == 1024  # the King James Bible
    assert vocabulary(16 * 4_600_000) == 4 * vocabulary(4_600_000)
    assert (vocabulary(0), vocabulary(10**15)) == (512, 32_768)


def test_the_batch_of_the_committed_campaigns_follows_from_their_tokens() -> None:
    assert batch_tokens(24_576 * 32) == 512
    assert batch_tokens(16 * 24_576 * 32) == 4 * 512


@pytest.mark.parametrize(("lr", "steps"), [(0.01, 48), (0.01, 215), (0.003, 3000)])
def test_the_decay_has_an_averaging_window_of_a_third_of_an_epoch(lr: float, steps: int) -> None:
    assert 1 / (lr * decay(lr, steps) * steps) == pytest.approx(0.35, rel=0.06) or decay(lr, steps) == 0.1


def test_a_repeated_token_counts_less_and_the_first_pass_fully() -> None:
    def fresh(epochs: float) -> float:  # the tokens of one pass that give the same loss
        loss = expected_loss(10**6, 10**6, epochs) - 482.0 / (10**6) ** 0.3478
        return (2085.4 / loss) ** (1 / 0.3658)

    assert fresh(1) == pytest.approx(10**6)
    assert fresh(4) == pytest.approx(3.726e6, rel=1e-3)  # Muennighoff et al., 4 epochs: nearly as good as fresh
    assert fresh(1000) == pytest.approx(16.39e6, rel=1e-3)  # and never more than 1 + 15.39


@pytest.mark.parametrize("tokens", [5_000, 110_000, 1_600_000, 30_000_000])
@pytest.mark.parametrize("seconds", [60, 600, 3600, 36_000])
def test_every_choice_fits_its_time_and_its_text(tokens: int, seconds: float) -> None:
    choice = choose(text(tokens), seconds, SIZES, SPEEDS, 128)
    assert choice.seconds <= 1.001 * seconds
    assert 0 < choice.final.tokens <= tokens
    assert choice.final.tokens % (choice.batch_size * choice.sequence_length) == 0
    assert choice.control.seconds <= 1.001 * choice.final.seconds or choice.control.model == "w16"
    assert (choice.members > 1) == (choice.workers > 1)
    assert choice.wd in choice.wds


def test_more_time_turns_a_lack_of_compute_into_a_lack_of_text() -> None:
    members = [choose(text(110_000), seconds, SIZES, SPEEDS, 128).members for seconds in (60, 600, 36_000)]
    assert members == [1, 3, 8]
    assert "Compute is the limit" in choose(text(110_000), 60, SIZES, SPEEDS, 128).reasons[1]
    assert "Text is the limit" in choose(text(110_000), 600, SIZES, SPEEDS, 128).reasons[1]


def test_the_whole_text_is_used_unless_one_pass_is_too_expensive() -> None:
    assert choose(text(1_600_000), 600, SIZES, SPEEDS, 128).final.tokens > 0.99 * 1_600_000
    part = choose(text(30_000_000), 600, SIZES, SPEEDS, 128).final
    assert part.epochs == 1 and part.tokens < 30_000_000


def test_texts_and_times_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="give at least 256"):
        choose(text(200), 600, SIZES, SPEEDS, 128)
    with pytest.raises(ValueError, match="give more time"):
        choose(text(110_000), 0.001, SIZES, SPEEDS, 128)


def test_a_large_vocabulary_and_a_small_share_are_said() -> None:
    assert cautions(text(100_000), 512, 90_000) == []
    found = cautions(text(4_000, documents=2), 1024, 1_000)
    for sentence, word in zip(found, ("1,024", "25.0%"), strict=True):
        assert word in sentence
