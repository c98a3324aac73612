"""Learned member weights against the optimality conditions and against whole logits in float64."""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize

from epochal.evaluation.ensembles import evaluate_ensemble
from epochal.evaluation.member_weights import minimize_on_simplex, probability_objective, rounded, select
from epochal.models.load import load_model
from epochal.records import load_records, write_record
from epochal.run import Ensemble
from epochal.training.loop import train

GAP = 1e-6  # nats


def probability_weights(table: torch.Tensor) -> np.ndarray:
    return minimize_on_simplex(probability_objective(table), len(table))


def test_probability_weights_meet_the_optimality_conditions() -> None:
    rng = np.random.default_rng(0)
    table = torch.from_numpy(np.log(rng.beta([[0.4], [0.5], [0.3], [0.05]], 2.0, (4, 3000)))).float()
    weights = probability_weights(table)
    p = table.double().exp().numpy()
    ratios = (p / (weights @ p)).mean(1)
    assert weights.sum() == pytest.approx(1.0)
    assert ratios.max() <= 1 + 2 * GAP  # Karush-Kuhn-Tucker: no member should weigh more ...
    assert ratios[weights > 1e-3] == pytest.approx(1.0, abs=1e-3)  # ... and every member with weight is balanced
    assert -np.log(weights @ p).mean() < -np.log(p.mean(0)).mean() - 0.01


def test_a_dominated_member_gets_no_weight_and_identical_members_share() -> None:
    good = torch.rand(500, generator=torch.Generator().manual_seed(0)).double().clamp(min=0.01)
    table = torch.stack([good, 0.5 * good, good]).log()
    weights = probability_weights(table)
    assert weights[1] < 1e-3
    assert weights[0] == pytest.approx(weights[2])


def test_the_optimum_may_be_inside_the_simplex_or_at_a_corner() -> None:
    matrix = np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 3.0]])

    def quadratic(target: np.ndarray) -> np.ndarray:
        return minimize_on_simplex(lambda w: (0.5 * (w - target) @ matrix @ (w - target), matrix @ (w - target)), 3)

    inside = np.array([0.2, 0.5, 0.3])
    assert quadratic(inside) == pytest.approx(inside, abs=1e-3)
    assert quadratic(np.array([5.0, -2.0, -2.0])) == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_selection_adds_the_best_member_and_returns_the_best_prefix() -> None:
    losses = {(0,): 3.0, (1,): 2.0, (2,): 2.5, (0, 1): 1.9, (1, 2): 1.5, (0, 1, 2): 1.7}

    def losses_of(rows: list[list[float]]) -> list[float]:
        return [losses.get(tuple(k for k, share in enumerate(row) if share), 9.0) for row in rows]

    assert select(3, losses_of) == ((1, 2), 1.5)


def test_rounded_weights_sum_to_one_and_are_accepted_by_a_job() -> None:
    for weights in (np.array([1, 1, 1]) / 3, np.array([0.9999999, 1e-7, 0.0])):
        decimals = rounded(weights)
        assert math.fsum(decimals) == pytest.approx(1.0, abs=1e-12) and min(decimals) >= 0
        assert decimals == pytest.approx(weights, abs=2e-6)
        Ensemble(name="e", runs=("a", "b", "c"), average="probs", member_weights=decimals)


def test_holdout_results_of_an_ensemble_match_float64_logits(tmp_path: Path) -> None:
    space, store, config = tiny.workspace(tmp_path)
    settings: list[dict[str, Any]] = [{"model": "w32"}, {"init_seed": 1}, {"init_seed": 2, "lr": 1e-4}]
    for number, changes in enumerate(settings):
        base = tiny.run(config, name=f"m{number}", holdout_tokens=512, epochs=2, **changes)
        record = train(base, space)
        assert record is not None
        write_record(space, record)
    rows = torch.from_numpy(store.holdout(base))
    assert rows.shape == (16, 32)
    with torch.no_grad():
        logits = [load_model(space, f"m{k}").double()(input_ids=rows).logits[:, :-1].flatten(0, 1) for k in range(3)]
    z, targets = torch.stack(logits), rows[:, 1:].flatten()

    def exact(weights: np.ndarray, average: str) -> float:
        shares = torch.from_numpy(np.asarray(weights))
        if average == "logits":
            return float(torch.nn.functional.cross_entropy(torch.einsum("k,knv->nv", shares, z), targets))
        mixture = torch.einsum("k,knv->nv", shares, torch.softmax(z, -1))
        return float(torch.nn.functional.nll_loss(mixture.log(), targets))

    for average in ("logits", "probs"):
        job = Ensemble(name=f"e-{average}", runs=("m0", "m1", "m2"), average=average)
        holdout = evaluate_ensemble(job, space, load_records(space)).results["holdout"]
        best = minimize(
            exact,
            np.full(3, 1 / 3),
            args=(average,),
            bounds=[(1e-9, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        assert holdout["tokens"] == 512
        assert holdout["loss"] == pytest.approx(exact(np.array(holdout["weights"]), average), abs=1e-6)
        assert holdout["loss"] == pytest.approx(best.fun, abs=2e-5)
        assert holdout["equal_loss"] == pytest.approx(exact(np.full(3, 1 / 3), average), abs=1e-6)
        assert holdout["loss"] < holdout["equal_loss"] - 1e-3
        assert holdout["weights"][2] < 0.05  # a much smaller lr: hardly trained
        options = {
            subset: exact(np.array([1 / len(subset) if k in subset else 0 for k in range(3)]), average)
            for size in (1, 2, 3)
            for subset in combinations(range(3), size)
        }
        assert tuple(holdout["selected"]) == min(options, key=options.__getitem__)
        assert holdout["selected_loss"] == pytest.approx(min(options.values()), abs=1e-6)
    weighted = Ensemble(
        name="e-learned", runs=("m0", "m1", "m2"), average="probs", member_weights=tuple(holdout["weights"])
    )
    assert "holdout" not in evaluate_ensemble(weighted, space, load_records(space)).results
