"""Weights of ensemble members learned on held-out text, and greedy selection of members.

The loss of both averages is convex in the weights, which lie on the simplex: non-negative, summing to one.
K members, n tokens, V vocabulary.
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
from epochal.optim.roles import head_weight
from epochal.stopping import check_stop

# Elements of the logits of all members in memory at a time.
CHUNK_ELEMENTS = 2**23

Vector = np.ndarray[Any, np.dtype[np.float64]]
# Loss in nats and gradient (K,) at weights (K,).
Objective = Callable[[Vector], tuple[float, Vector]]


@dataclass(frozen=True)
class Learned:
    """Learned weights (K,) that sum to one, selected members, and mean held-out losses in nats.

    `selected` are, in ascending order, the members whose equal average is best, selected greedily (Caruana et al. 2004).
    """

    weights: tuple[float, ...]  # (K,), summing to one
    selected: tuple[int, ...]  # members whose equal average is best, ascending
    loss: float  # held-out, with `weights`
    selected_loss: float  # of the selected members
    equal_loss: float  # of all members


def learn(members: Sequence[Loader], sequences: Tokens, *, average: str) -> Learned:
    """Learn member weights, and select members, on held-out sequences (r, T).

    No member may have been trained on them.

    For "logits" the hidden states and heads of all members are in memory.
    """
    count = len(members)
    if average == "probs":
        table = target_log_probs(members, sequences)
        objective = probability_objective(table)
    else:
        objective = _logit_objective(members, sequences)

    def losses_of(shares: list[list[float]]) -> list[float]:
        rows = torch.tensor(shares, dtype=torch.float64)
        losses = probability_losses(table, rows) if average == "probs" else logit_losses(members, sequences, rows)
        return [float(loss) for loss in losses]

    # Rounded before the loss is computed, so that a job with these weights has exactly this loss.
    weights = rounded(minimize_on_simplex(objective, count))
    selected, selected_loss = select(count, losses_of)
    loss, equal = losses_of([list(weights), [1.0 / count] * count])
    return Learned(weights, selected, loss, selected_loss, equal)


def minimize_on_simplex(objective: Objective, count: int) -> Vector:
    """Return the `count` non-negative weights that sum to one and minimize a convex objective."""
    from scipy.optimize import minimize

    # Convex, so any start leads to the optimum.
    result = minimize(
        objective,
        np.full(count, 1.0 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(count)},
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    weights = np.clip(result.x, 0.0, None)  # SLSQP meets bounds and sum only up to rounding
    return np.asarray(weights / weights.sum())


def probability_objective(table: torch.Tensor) -> Objective:
    """Return the loss of averaged probabilities, up to a constant, from (K, n) log p_k(target)."""
    p = np.exp((table - table.amax(0)).double().numpy())  # scaled per token against underflow: shifts the loss only

    def objective(weights: Vector) -> tuple[float, Vector]:
        mixture = weights @ p
        return -float(np.log(mixture).mean()), -(p / mixture).mean(1)

    return objective


def _logit_objective(members: Sequence[Loader], sequences: Tokens) -> Objective:
    """Return the mean of -log softmax(sum_k w_k z_k)(target)."""
    pairs = [_hidden(load(), torch.from_numpy(sequences)) for load in members]
    targets = torch.from_numpy(sequences)[:, 1:].flatten().to(pairs[0][0].device)
    rows = max(1, CHUNK_ELEMENTS // (len(pairs) * pairs[0][1].shape[0]))

    @torch.no_grad()
    def objective(weights: Vector) -> tuple[float, Vector]:
        loss, gradient = 0.0, np.zeros(len(pairs))
        for start in range(0, len(targets), rows):
            check_stop()
            part, y = slice(start, start + rows), targets[start : start + rows]
            z = torch.stack([hidden[part] @ head.T for hidden, head in pairs])  # (K, tokens, V)
            mean = torch.einsum("k,ktv->tv", torch.from_numpy(weights).float().to(z.device), z)
            # A sum in float32 would be too noisy for the line search of the optimizer.
            loss += float(torch.nn.functional.cross_entropy(mean, y, reduction="none").double().sum())
            # d loss / d w_k = expected logit under the ensemble - logit at the target
            expected = torch.einsum("ktv,tv->kt", z, torch.softmax(mean, 1))
            gradient += (expected - z[:, torch.arange(len(y)), y]).double().sum(1).cpu().numpy()
        return loss / len(targets), gradient / len(targets)

    return objective


@torch.no_grad()
def _hidden(model: Any, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hidden states (n, d) and the head (V, d) of a model, float32."""
    parts = [next_token(model, chunk.to(model.device))[0].float() for chunk in torch.split(sequences, 64)]
    return torch.cat(parts), head_weight(model).detach().float().clone()


def select(count: int, losses_of: Callable[[list[list[float]]], list[float]]) -> tuple[tuple[int, ...], float]:
    """Add the member that helps most until all are used; return the best members on that path and their loss.

    `losses_of` gives the losses of rows of weights (S, K).
    """
    chosen: list[int] = []
    path: list[tuple[float, tuple[int, ...]]] = []
    # Without replacement, and to the end: the loss along the path may rise and fall again.
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
    """Return weights as short decimals for a job; the largest one takes the remainder so that they sum to one."""
    decimals = [round(float(weight), digits) for weight in weights]
    largest = decimals.index(max(decimals))
    decimals[largest] = round(1.0 - math.fsum(decimals[:largest] + decimals[largest + 1 :]), digits)
    return tuple(decimals)
