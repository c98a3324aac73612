"""Against forgetting: a pull to the weights that a run starts from, and the text of the run that made them.

L2 to the start (L2-SP, arXiv 1802.01483) in the decoupled form of weight decay: w <- w - lr strength (w - w0), next to the
optimizer's own step. EWC (arXiv 1612.00796): w <- w - min(1, lr strength F) (w - w0), where F is the diagonal of the Fisher
information of w0 on the old text over its mean, so that strengths of both are in the same unit and F = 1 is L2. At most 1
because the largest F is thousands of times the mean, and a longer step would go past w0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from epochal.data.store import Stream, Tokens, TokenStore, open_store
from epochal.models.llama import next_token, start_from
from epochal.optim.roles import head_weight
from epochal.records import Records, Workspace
from epochal.run import Run

# Sequences of the old text that the Fisher information is estimated on: the first ones of the run's order.
FISHER_SEQUENCES = 256


class WeightAnchor:
    """The weights to stay near, and how strongly: one more copy of the model, two with Fisher information."""

    def __init__(self, strength: float, start: Mapping[Tensor, Tensor], fisher: Mapping[Tensor, Tensor] | None) -> None:
        self.strength, self.start, self.fisher = strength, start, fisher

    @torch.no_grad()
    def pull(self, groups: Sequence[dict[str, Any]]) -> None:
        """Move the weights of optimizer groups to the start, each at its learning rate."""
        for group in groups:
            rate = group["lr"] * self.strength
            for weight in group["params"]:
                if self.fisher is None:
                    weight.lerp_(self.start[weight], min(1.0, rate))
                else:
                    weight.lerp_(self.start[weight], (rate * self.fisher[weight]).clamp(max=1.0))


def check_anchor(run: Run, backend: str, world: int) -> None:
    """Raise ValueError for an anchor that processes of a backend cannot have."""
    if run.anchor is None:
        return
    if backend != "replicated":
        raise ValueError(
            f"Run {run.name!r} has an anchor, which moves whole weights, and {backend} keeps pieces or copies of them; "
            "use one process or ddp."
        )
    if run.anchor.fisher and world > 1:
        # Each process would estimate it, and on a GPU their sums differ in the last bit.
        raise ValueError(f"Run {run.name!r} estimates Fisher information, which one process does; use one process.")


def mean_squared_gradient(losses: Iterable[Tensor], parameters: Sequence[Tensor], count: float) -> list[Tensor]:
    """Return the sum over losses of each parameter's squared gradient, over `count`."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for loss in losses:
        for one, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            one.addcmul_(gradient, gradient, value=1.0 / count)
    return total


def drawn_loss(logits: Tensor, seed: int) -> Tensor:
    """Return the summed loss of labels drawn from the softmax of logits (n, V), 0-d.

    Its squared gradient is the Fisher information of the n predictions in expectation: gradients of different labels have
    mean zero given the labels before them, so their products drop out. Labels of the text would not give it (arXiv
    1905.12558).
    """
    generator = torch.Generator(logits.device).manual_seed(seed)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def language_fisher(model: Any, sequences: Tokens) -> list[Tensor]:
    """Return the Fisher information of one prediction for each parameter, estimated on (n, T) sequences."""
    device = next(model.parameters()).device

    def losses() -> Iterable[Tensor]:
        for number, sequence in enumerate(sequences):
            hidden, _ = next_token(model, torch.from_numpy(sequence[None]).to(device))
            yield drawn_loss(hidden @ head_weight(model).T, seed=number)

    predictions = len(sequences) * (sequences.shape[1] - 1)
    return mean_squared_gradient(losses(), list(model.parameters()), predictions)


def load_anchor(
    run: Run, build: Callable[[], Any], model: Any, store: TokenStore, workspace: Workspace, records: Records
) -> WeightAnchor | None:
    """Return the anchor of a Run that trains `model`, on its device; None without one.

    `build` makes a model of the same shapes for the weights to start from, which a resumed run does not hold.
    """
    if run.anchor is None or run.anchor.strength == 0:
        return None
    base = build().to(next(model.parameters()).device)
    start_from(run, base, workspace, store.tokenizer_folder)
    weights = [model.get_parameter(name) for name, _ in base.named_parameters()]
    start = {weight: first.detach() for weight, first in zip(weights, base.parameters(), strict=True)}
    if not run.anchor.fisher:
        return WeightAnchor(run.anchor.strength, start, None)
    stream = old_text(run, store, workspace, records)
    count = min(FISHER_SEQUENCES, stream.sequences_per_epoch)
    sequences = np.stack([stream.sequence(number) for number in range(count)]).astype(np.int64)
    fisher = language_fisher(base.eval(), sequences)
    mean = torch.cat([one.flatten() for one in fisher]).mean()
    return WeightAnchor(run.anchor.strength, start, dict(zip(weights, [one / mean for one in fisher], strict=True)))


def old_text(run: Run, store: TokenStore, workspace: Workspace, records: Records) -> Stream:
    """Return the training text of the Run named by `init_from`, in this run's order.

    Raises ValueError if it has another vocabulary.
    """
    record = None if run.init_from is None else records.named(run.init_from)
    assert record is not None and isinstance(record.job, Run)  # checked by `Run` and `input_fingerprints`
    old = open_store(record.job.data, workspace)
    if old.vocabulary != store.vocabulary:
        raise ValueError(
            f"Run {run.name!r} cannot see the text of {run.init_from!r} again: {old.folder} has another vocabulary than "
            f"{store.folder}; prepare both with one tokenizer."
        )
    same: dict[str, Any] = {
        "sequence_length": run.sequence_length,
        "data_order": run.data_order,
        "order_seed": run.order_seed,
    }
    return old.training_stream(replace(record.job, **same, batch_size=1, distill=None, teach=None))
