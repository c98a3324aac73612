"""Two claims of the paper about members: the excess falls like 1 / K, and a good member is not a good single model.

The second needs ensembles at the point of the best single model, made of the seeds that were run there anyway.
"""

import math

from epochal.records import Record, Records
from epochal.report.claims import Claim
from epochal.run import Ensemble, without_seed
from epochal.scale import Scale
from epochal.scaling import fit_power_law
from recipes import heavy_weight_decay

FEWEST = 4
"""Numbers of members below which a free exponent says nothing."""


def single_point_ensembles(records: Records, scale: Scale, tokens: int) -> dict[str, Ensemble]:
    """Return, by ensembled size, the ensemble of the seeds at the best single model's point."""
    found = {}
    for model in scale.ensemble.models if scale.seeds > 1 else ():
        search = heavy_weight_decay.tuned(records, scale, model, tokens)
        if search.certified and search.best is not None:
            runs = [scale.run(model, tokens, search.best, seed=seed) for seed in range(scale.seeds)]
            names = tuple(run.name for run in runs)
            found[model] = Ensemble(name=f"{without_seed(names[0])}-k{len(runs)}-logits", runs=names, average="logits")
    return found


def exponent_claim(model: str, tokens: int, record: Record, reasons: tuple[str, ...]) -> Claim | None:
    """Fit a free exponent in K to the mean losses of one ensemble; None with fewer than four numbers of members."""
    means = {int(k): sum(losses) / len(losses) for k, losses in record.results["curve"].items()}
    if len(means) < FEWEST:
        return None
    law = fit_power_law(list(means), list(means.values()))
    return Claim(
        text=f"D = {tokens:,}: the excess of K {model} members (logits) falls like 1 / K",
        value=f"exponent {law.alpha:.2f}",
        paper="0.96 to 1.09 over seven tables, sections 6 and 13",
        seeds=max(means),
        holds=0.8 <= law.alpha <= 1.25,
        provisional=(*reasons, "one set of members"),
    )


def both_settings(by_rule: Record | None, plain: Record | None, k: int) -> tuple[float, float] | None:
    """Return the losses of K members by the rule (the mean over subsets) and of K at the best single model's point.

    None before both have run, and where the rule's record has no such K.
    """
    curve = by_rule.results.get("curve", {}).get(str(k), []) if by_rule else []
    if not curve or plain is None:
        return None
    return sum(curve) / len(curve), plain.loss


def settings_claim(
    records: Records, scale: Scale, tokens: int, model: str, by_rule: Record | None, plain: Ensemble
) -> Claim | None:
    """Compare K members of both settings at the K of the smaller ensemble; None before both have run."""
    k = len(plain.runs)
    losses = both_settings(by_rule, records.get(plain), k)
    if losses is None or not math.isfinite(losses[1]):
        return None
    longer, single = losses
    return Claim(
        text=f"D = {tokens:,}: {k} {model} members of twice the epochs and half the decay beat {k} of the best single setting",
        value=f"{single - longer:+.4f} nats ({single:.4f} to {longer:.4f})",
        paper="limits 3.34 and 3.27 for 300M, section 6",
        seeds=k,
        holds=longer < single,
        provisional=heavy_weight_decay.missing(records, scale, tokens),
    )


def exponent_claims(
    records: Records, scale: Scale, tokens: int, done: list[tuple[str, Ensemble, Record]]
) -> list[Claim]:
    """Fit the exponent for every size whose members, averaged in logits, have run."""
    reasons = heavy_weight_decay.missing(records, scale, tokens)
    found = [
        exponent_claim(model, tokens, record, reasons)
        for model, ensemble, record in done
        if ensemble.average == "logits"
    ]
    return [claim for claim in found if claim is not None]
