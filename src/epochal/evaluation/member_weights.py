"""How much each member of an ensemble should count, learned on text that no member has seen; and which to leave out.

Both losses are convex in the weights on the simplex, and an optimum is certified: at weights w with gradient g no other
weights are better by more than g.w - min g. Equal weights are always reported beside. K members, n tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from epochal.data.store import Tokens
from epochal.evaluation.losses import logit_losses, probability_losses, target_log_probs
from epochal.models.llama import next_token
from epochal.models.load import Loader
from epochal.stopping import check_stop

GAP = 1e-6
"""Nats by which learned weights may miss the optimum."""

CHUNK_ELEMENTS = 2**23
"""Elements of the logits of all members, (K, tokens, V), that exist at a time."""

Vector = np.ndarray[Any, np.dtype[np.float64]]
Moments = Callable[[Vector], tuple[float, Vector, Vector]]
"""Loss in nats, gradient (K,) and Hessian (K, K) at weights (K,)."""


@dataclass(frozen=True)
class Learned:
    """What held-out text says: weights (K,) that sum to one, members in the order of their use, and mean losses in nats.

    `selected` are the members whose equal average is best, found by adding one at a time (Caruana et al. 2004).
    """

    weights: tuple[float, ...]
    selected: tuple[int, ...]
    loss: float
    selected_loss: float
    equal_loss: float


def learn(members: Sequence[Loader], sequences: Tokens, *, average: str) -> Learned:
    """Learn weights of members, and choose among them, on (r, T) sequences that they have not seen.

    For "logits" the hidden states and heads of all members are in memory.
    """
    count = len(members)
    if average == "probs":
        table = target_log_probs(members, sequences)
        found = probability_weights(table)
    else:
        found = newton(_logit_moments(members, sequences), count)

    def losses_of(shares: list[list[float]]) -> list[float]:
        rows = torch.tensor(shares, dtype=torch.float64)
        losses = probability_losses(table, rows) if average == "probs" else logit_losses(members, sequences, rows)
        return [float(loss) for loss in losses]

    weights = rounded(found)
    selected, selected_loss = select(count, losses_of)
    loss, equal = losses_of([list(weights), [1.0 / count] * count])
    return Learned(weights, selected, loss, selected_loss, equal)


def probability_weights(table: torch.Tensor) -> Vector:
    """Return the weights that maximise the mean of log sum_k w_k p_k(target), from (K, n) log p_k(target): EM.

    A step sets each weight to its member's mean responsibility for the targets, so weights stay on the simplex.
    """
    p = np.exp((table - table.amax(0)).double().numpy())  # a common factor of a column changes no responsibility
    weights = np.full(len(p), 1.0 / len(p))
    for _ in range(100_000):
        ratios = (p / (weights @ p)).mean(1)  # minus the gradient
        if ratios.max() - 1.0 < GAP:
            break
        weights = weights * ratios
    return np.asarray(weights / weights.sum())


def newton(moments: Moments, count: int) -> Vector:
    """Minimise a smooth convex function over the simplex of `count` weights: quadratic models, solved on the simplex."""
    weights = np.full(count, 1.0 / count)
    loss, gradient, hessian = moments(weights)
    for _ in range(50):
        if gradient @ weights - gradient.min() < GAP:
            break
        step = _quadratic_minimum(weights, gradient, hessian) - weights
        share = 1.0
        while share > 1e-4:  # the whole step but for rounding and strong curvature
            candidate = moments(weights + share * step)
            if candidate[0] <= loss + 0.1 * share * float(gradient @ step):
                break
            share /= 2
        else:
            break  # rounding hides what is left
        weights = weights + share * step
        loss, gradient, hessian = candidate
    return weights


def _quadratic_minimum(at: Vector, gradient: Vector, hessian: Vector) -> Vector:
    """Minimise gradient.(w - at) + (w - at).hessian.(w - at) / 2 over the simplex, by accelerated projected descent."""
    rate = 1.0 / max(float(np.linalg.eigvalsh(hessian)[-1]), 1e-12)
    weights, ahead = at.copy(), at.copy()
    for number in range(2000):
        after = _project(ahead - rate * (gradient + hessian @ (ahead - at)))
        ahead = after + number / (number + 3) * (after - weights)
        weights = after
    return weights


def _project(values: Vector) -> Vector:
    """Return the nearest point of the simplex (Held, Wolfe and Crowder 1974)."""
    falling = np.sort(values)[::-1]
    excess = (np.cumsum(falling) - 1.0) / np.arange(1, len(values) + 1)
    nearest: Vector = np.maximum(values - excess[np.flatnonzero(falling > excess)[-1]], 0.0)
    return nearest


def _logit_moments(members: Sequence[Loader], sequences: Tokens) -> Moments:
    """Return the moments of -log softmax(sum_k w_k z_k)(target): its gradient and Hessian are those of a log-sum-exp."""
    pairs = [_hidden(load(), torch.from_numpy(sequences)) for load in members]
    targets = torch.from_numpy(sequences)[:, 1:].flatten()
    rows = max(1, CHUNK_ELEMENTS // (len(pairs) * pairs[0][1].shape[0]))

    @torch.no_grad()
    def moments(weights: Vector) -> tuple[float, Vector, Vector]:
        shares = torch.from_numpy(weights).float()
        loss, gradient, hessian = 0.0, np.zeros(len(pairs)), np.zeros((len(pairs), len(pairs)))
        for start in range(0, len(targets), rows):
            check_stop()
            part, y = slice(start, start + rows), targets[start : start + rows]
            z = torch.stack([hidden[part] @ head.T for hidden, head in pairs])  # (K, tokens, V)
            mean = torch.einsum("k,ktv->tv", shares.to(z.device), z)
            p = torch.softmax(mean, 1)
            expected = torch.einsum("ktv,tv->kt", z, p)
            at_target = z[:, torch.arange(len(y)), y.to(z.device)]
            loss += float(torch.nn.functional.cross_entropy(mean, y.to(z.device), reduction="sum"))
            gradient += (expected - at_target).double().sum(1).cpu().numpy()
            z = (z - expected[..., None]) * p.sqrt()
            flat = z.flatten(1)
            hessian += (flat @ flat.T).double().cpu().numpy()
        return loss / len(targets), gradient / len(targets), hessian / len(targets)

    return moments


@torch.no_grad()
def _hidden(model: Any, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (n, d) of a model over (r, T) sequences and its head (V, d), float32."""
    parts = [next_token(model, chunk.to(model.device))[0].float() for chunk in torch.split(sequences, 64)]
    return torch.cat(parts), model.lm_head.weight.detach().float().clone()


def select(count: int, losses_of: Callable[[list[list[float]]], list[float]]) -> tuple[tuple[int, ...], float]:
    """Return the members, sorted, whose equal average is best on the way from none to all, and its loss.

    Each round adds the member that helps most. `losses_of` gives the losses of rows of weights (S, K).
    """
    chosen: list[int] = []
    path: list[tuple[float, tuple[int, ...]]] = []
    while len(chosen) < count:
        options = [[*chosen, member] for member in range(count) if member not in chosen]
        rows = [[1.0 / len(option) if member in option else 0.0 for member in range(count)] for option in options]
        losses = losses_of(rows)
        best = min(range(len(options)), key=losses.__getitem__)
        chosen = options[best]
        path.append((losses[best], tuple(sorted(chosen))))
    loss, members = min(path)
    return members, loss


def rounded(weights: Vector, digits: int = 6) -> tuple[float, ...]:
    """Return weights as decimals that sum to one and fit into a job; what rounding leaves goes to the largest."""
    found = [round(float(weight), digits) for weight in weights]
    largest = found.index(max(found))
    found[largest] = round(1.0 - math.fsum(found[:largest] + found[largest + 1 :]), digits)
    return tuple(found)
