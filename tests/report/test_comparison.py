"""epochal.report.comparison against numbers computed by hand."""

import math
from types import SimpleNamespace

import pytest
from scipy import stats

from epochal.report.claims import Case, Claim, reservations, verdict_line
from epochal.report.comparison import (
    ArmLosses,
    Pair,
    comparison_table,
    difference_claim,
    family_claim,
    gain_case,
    gains_by_seed,
    long_enough,
    measured_case,
    pair_claims,
    settled,
    welch_claim,
)

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


def test_a_claim_with_an_interval_around_zero_is_open_except_for_one_of_equality():
    differences = [0.004, -0.002, 0.001]
    lower = difference_claim("a is lower", differences, caveats=("seeds of a",))
    assert (lower.holds, lower.provisional) == (None, ("seeds of a", "within noise"))
    equal = difference_claim("a is as good", differences, tolerance=0.01)
    assert (equal.holds, equal.provisional) == (True, ())
    assert difference_claim("a is as good", differences[:2], tolerance=0.01).provisional == ("two seeds",)
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


# --- unpaired baselines, families, sizes --------------------------------------------------------------------------------


def test_an_unpaired_baseline_has_its_own_variance():
    """The interval is that of Welch's test in scipy."""
    losses, baseline = [4.0, 4.1, 4.05, 4.02], [4.3, 4.5, 4.2]
    claim = welch_claim("a beats b", losses, baseline, id="a", paper="0.1 nats", size=0.1)
    ends = stats.ttest_ind(baseline, losses, equal_var=False).confidence_interval(0.9)
    assert claim.interval == pytest.approx((ends.low, ends.high)) and claim.seeds == 3
    assert verdict_line(claim) == "reproduced (sign; 2.9x larger)"
    one = welch_claim("a beats b", losses, [4.3], id="a")
    assert one.interval is None and one.provisional == ("one seed",), "one run is no baseline for an interval"
    assert welch_claim("a beats b", losses, [4.3, 4.2], id="a").provisional == ("two seeds",)
    wide = welch_claim("a beats b", losses, baseline, id="a", search=0.3)
    assert wide.provisional == ("within noise",) and wide.interval[0] < claim.interval[0]


def test_cases_are_settled_by_holms_procedure():
    """Chances of 0.01, 0.02 and 0.04 with three cases: 0.01 < 0.05 / 3, 0.02 < 0.05 / 2 and 0.04 < 0.05."""
    cases = [Case(str(p), 0.1, None, float(stats.t.isf(p, 4)), 4) for p in (0.04, 0.01, 0.02)]
    assert settled(cases, 1) == 3 and settled(cases, -1) == 0
    cases[0] = Case("0.3", 0.1, None, float(stats.t.isf(0.3, 4)), 4)
    assert settled(cases, 1) == 2
    cases[2] = Case("0.03", 0.1, None, float(stats.t.isf(0.03, 4)), 4)
    assert settled(cases, 1) == 1, "0.03 is above 0.05 / 2, so it and all larger ones stay open"


@pytest.mark.parametrize(
    ("gains", "holds"),
    [((0.2, 0.3), True), ((0.2, 0.001), True), ((0.2, -0.001), None), ((0.2, -0.3), False), ((-0.001, -0.002), None)],
)
def test_a_family_fails_where_one_case_is_settled_against_it(gains, holds):
    cases = [measured_case(str(gain), gain, (gain - 0.01, gain + 0.01), dof=4) for gain in gains]
    claim = family_claim("a beats b everywhere", cases, [gain > 0 for gain in gains], id="f", seeds=3)
    assert claim.holds is holds and claim.cases == tuple(cases)
    noisy = any("within noise" in reason for reason in claim.provisional)
    assert noisy == any(abs(gain) < 0.01 for gain in gains)


def test_a_family_without_all_of_its_cases_does_not_hold_yet():
    cases = [measured_case("one", 0.2, (0.19, 0.21), dof=4)]
    claims = [family_claim("everywhere", cases, [True], id="f", planned=planned) for planned in (1, 2)]
    assert [claim.holds for claim in claims] == [True, None]
    assert claims[1].provisional == ("1 of 2 cases have run",)
    worse = [measured_case("one", -0.2, (-0.21, -0.19), dof=4)]
    assert family_claim("everywhere", worse, [False], id="f", planned=2).holds is False, "one case is enough against it"


def test_signs_alone_decide_only_without_any_interval():
    bare, noisy = [measured_case("one", 0.2, None)], [measured_case("one", 0.2, (-0.1, 0.5), dof=4)]
    assert [family_claim("f", cases, [True], id="f").holds for cases in (bare, noisy)] == [True, None]


def test_an_unpaired_case_is_settled_as_by_welchs_test():
    """Few degrees of freedom widen the far tail, where Holm's first threshold lies."""
    losses, baseline = [4.00, 4.0002, 3.9998], [4.10, 4.12, 4.08]
    case = gain_case("a", losses, baseline)
    chance = stats.ttest_ind(baseline, losses, equal_var=False, alternative="greater").pvalue
    assert float(stats.t.sf(case.t, case.dof)) == pytest.approx(chance)


def test_a_family_shows_differences_with_their_sign_and_losses_without():
    cases = [measured_case(str(value), value, None) for value in (3.5, 4.25)]
    shown = [family_claim("f", cases, [True, True], id="f", seeds=3, differences=d).value for d in (True, False)]
    assert [value.split("): ")[1] for value in shown] == ["+3.5000 to +4.2500 nats", "3.5000 to 4.2500 nats"]


def test_a_case_without_a_finite_interval_settles_nothing():
    for interval in (None, (-math.inf, 0.2)):
        case = measured_case("a", 0.1, interval)
        assert (case.interval, case.t) == (None, None) and settled([case], 1) == 0


@pytest.mark.parametrize(("seeds", "reason"), [(1, ("one seed",)), (2, ("two seeds",)), (3, ())])
def test_a_verdict_without_interval_needs_three_seeds(seeds, reason):
    assert reservations(Claim(text="t", value="1", holds=True, seeds=seeds)) == reason
    assert reservations(Claim(text="t", value="1", holds=True, seeds=seeds, interval=(0.1, 0.2))) == ()


def test_a_run_of_few_steps_tests_nothing():
    claim = difference_claim("a is lower", [0.1, 0.2, 0.15])
    assert long_enough(claim, [SimpleNamespace(steps=100)]) == claim
    short = long_enough(claim, [SimpleNamespace(steps=100), SimpleNamespace(steps=6)])
    assert (short.holds, short.untestable) == (None, "a run has 6 optimizer steps, at least 100 are needed")
