"""epochal.report.comparison against numbers computed by hand."""

import pytest

from epochal.report.comparison import ArmLosses, Pair, comparison_table, difference_claim, gains_by_seed, pair_claims

PLAIN = ArmLosses(label="AdamW", losses={0: 4.0, 1: 4.2, 2: 4.4}, cells=(0.01,))
FIRA = ArmLosses(
    label="Fira", losses={0: 3.9, 1: 4.0, 2: 4.1}, cells=(0.03,), caveats=("best lr is the largest tried",)
)
MUON = ArmLosses(label="Muon", losses={2: 4.5}, cells=(None,), caveats=("seeds of Muon",))
EMPTY = ArmLosses(label="Lion", losses={}, cells=(None,))
ARMS = [PLAIN, FIRA, MUON, EMPTY]

# Fira's gains are 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, standard error 0.1 / sqrt(3); Student's t with two
# degrees of freedom leaves 5% above 2.919986.
HALF_WIDTH = 2.919986 * 0.1 / 3**0.5


def test_gains_are_paired_by_seed_and_positive_when_the_loss_is_lower():
    assert gains_by_seed({2: 4.0, 0: 3.5}, {0: 4.0, 1: 4.0, 2: 3.0}) == {0: 0.5, 2: -1.0}


def test_the_table_has_the_gain_over_the_baseline_with_its_paired_interval():
    table = comparison_table("Tuned", ARMS, baseline="AdamW", heading="optimizer", columns=("lr",))
    assert table.columns == ("optimizer", "lr", "loss", "gain over AdamW (nats)", "90% low", "90% high", "seeds")
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == ["AdamW", "Fira", "Muon", "Lion"]
    assert rows["AdamW"] == (0.01, pytest.approx(4.2), None, None, None, 3)
    interval = (pytest.approx(0.2 - HALF_WIDTH), pytest.approx(0.2 + HALF_WIDTH))
    assert rows["Fira"] == (0.03, pytest.approx(4.0), pytest.approx(0.2), *interval, 3)
    assert rows["Muon"] == (None, 4.5, pytest.approx(-0.1), None, None, 1)
    assert rows["Lion"] == (None, None, None, None, None, 0)


def test_a_pair_becomes_a_claim_with_the_caveats_of_both_arms():
    pairs = [Pair(id="one-pass.fira-adamw", better="Fira", worse="AdamW", paper="0.092 nats")]
    (claim,) = pair_claims(ARMS, pairs, condition="one pass", caveats=("no neighbors",))
    assert (claim.id, claim.text) == ("one-pass.fira-adamw", "one pass: Fira has a lower loss than AdamW")
    assert (claim.value, claim.seeds, claim.holds, claim.paper) == ("+0.2000 nats", 3, True, "0.092 nats")
    assert claim.interval == (pytest.approx(0.2 - HALF_WIDTH), pytest.approx(0.2 + HALF_WIDTH))
    assert claim.provisional == ("best lr is the largest tried", "no neighbors")


def test_a_loss_that_is_higher_fails_the_claim_and_one_seed_is_provisional():
    (claim,) = pair_claims(ARMS, [Pair(better="Muon", worse="AdamW", text="Muon is better")])
    assert (claim.text, claim.value, claim.interval, claim.holds) == ("Muon is better", "-0.1000 nats", None, False)
    assert claim.provisional == ("seeds of Muon", "one seed")


def test_a_pair_without_a_common_seed_makes_no_claim():
    assert pair_claims(ARMS, [Pair(better="Lion", worse="AdamW")]) == []


def test_an_interval_around_zero_is_provisional_except_for_a_claim_of_equality():
    differences = [0.004, -0.002]
    lower = difference_claim("a is lower", differences, caveats=("seeds of a",))
    assert (lower.holds, lower.provisional) == (True, ("seeds of a", "within noise"))
    equal = difference_claim("a is as good", differences, tolerance=0.01)
    assert (equal.holds, equal.provisional) == (True, ())
    assert not difference_claim("a is as good", [0.02, 0.03], tolerance=0.01).holds
    assert difference_claim("a is as good", [0.001], tolerance=0.01).provisional == ("one seed",)


def test_an_unknown_arm_is_named_with_the_nearest_one():
    with pytest.raises(
        ValueError, match=r"no arm is called 'Fire' \(did you mean 'Fira'\?\); the arms are AdamW, Fira"
    ):
        pair_claims(ARMS, [Pair(better="Fire", worse="AdamW")])
    with pytest.raises(ValueError, match="no arm is called 'SGD'"):
        comparison_table("t", ARMS, baseline="SGD")


def test_a_tolerance_needs_its_own_text():
    with pytest.raises(ValueError, match="give the text too"):
        Pair(better="a", worse="b", tolerance=0.01)
