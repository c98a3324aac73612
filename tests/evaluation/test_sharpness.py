"""The sharpness of a model against its whole Hessian."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.func import functional_call

from epochal.evaluation.ensembles import evaluate_ensemble
from epochal.evaluation.sharpness import sharpness, top_eigenvalue
from epochal.models.load import load_model
from epochal.names import named_ensemble
from epochal.records import load_records, write_record
from epochal.training.loop import train


class Bigram(torch.nn.Module):
    """Logits that depend on the last token, by an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.head = torch.nn.Embedding(6, 3), torch.nn.Linear(3, 6, bias=False)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def test_it_is_the_largest_eigenvalue_of_the_hessian_and_the_weights_stay() -> None:
    model, tokens = Bigram().double(), np.random.default_rng(0).integers(0, 6, (4, 9))
    rows, shapes = torch.from_numpy(tokens), {name: w.shape for name, w in model.named_parameters()}
    flat = torch.cat([w.detach().flatten() for w in model.parameters()])

    def loss(values: torch.Tensor) -> torch.Tensor:
        parts = torch.split(values, [shape.numel() for shape in shapes.values()])
        weights = {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = functional_call(model, weights, (rows,)).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    assert top_eigenvalue(model, tokens) == pytest.approx(float(values[-1]), rel=0.02)
    assert torch.equal(torch.cat([w.detach().flatten() for w in model.parameters()]), flat)


def test_an_ensemble_records_that_of_each_member(tmp_path: Path) -> None:
    space, store, config = tiny.workspace(tmp_path)
    runs = [replace(tiny.run(config, epochs=1), name=f"m{seed}", init_seed=seed) for seed in range(2)]
    for run in runs:
        record = train(run, space)
        assert record is not None
        write_record(space, record)
    job = named_ensemble(("m0", "m1"), "logits", sharpness=True)
    assert job.name.endswith("-logits-sharpness")
    found = evaluate_ensemble(job, space, load_records(space)).results["sharpness"]
    assert found == [sharpness(load_model(space, run.name), store.training_stream(run)) for run in runs]
    assert found[0] != found[1] and min(found) > 0
