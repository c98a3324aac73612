"""What DeepSpeed passes to an optimizer, recorded by one that changes nothing; epochal.optim is not involved."""

from __future__ import annotations

from typing import Any

import torch
import toy

CLIP, PARTS, PEAK = 0.05, 2, 0.5


class Recorder(torch.optim.Optimizer):
    """Records every call of `step` and changes no weight."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.calls: list[list[dict[str, Any]]] = []
        super().__init__(groups, {"lr": PEAK})

    def step(self, closure: Any = None) -> None:
        self.calls.append(
            [
                {
                    "number": group.get("number"),
                    "shape": tuple(shard.shape),
                    "gradient_shape": None if shard.grad is None else tuple(shard.grad.shape),
                    "values": shard.detach().clone(),
                    "gradient": None if shard.grad is None else shard.grad.clone(),
                }
                for group in self.param_groups
                for shard in group["params"]
            ]
        )


def model_of_distinct_values() -> toy.ModelWithLoss:
    """A model in which every element has a different value, so that its position in a shard can be read off."""
    model, generator = toy.ModelWithLoss(2), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    values = torch.cat([p.detach().flatten() for p in model.model.parameters()])
    assert len(values.unique()) == len(values)
    return model


def record(preset: str) -> dict[str, Any]:
    """One clipped step in two micro-batches; returns what the optimizer received and where the parameters are."""
    processes = toy.start(preset, clip_norm=CLIP, micro_batch=toy.ROWS // PARTS)
    model = model_of_distinct_values()
    named = list(model.model.named_parameters())
    groups = [
        {"params": [p for n, p in named if toy.is_matrix(n) == whole], "number": k}
        for k, whole in ((0, True), (1, False))
    ]
    recorder = Recorder(groups)
    engine, _ = processes.accelerator.prepare(model, recorder)
    at_construction, norms = len(recorder.calls), []
    group_norm = engine.optimizer.get_grad_norm_direct

    def recorded_norm(gradients: Any, parameters: Any) -> torch.Tensor:
        norms.append(group_norm(gradients, parameters).double())
        return norms[-1]

    engine.optimizer.get_grad_norm_direct = recorded_norm
    rows = toy.batch(0)[processes.rank :: processes.world]
    for number, chunk in enumerate(rows.chunk(PARTS)):
        engine.set_gradient_accumulation_boundary(number == PARTS - 1)
        engine.backward(engine(chunk) / (len(rows) * 8), scale_wrt_gas=False)
    between = [len(group["params"]) for group in recorder.param_groups]
    engine.step()
    return {
        "at_construction": at_construction,
        "calls": recorder.calls,
        "same_objects": [id(p) for p in engine.module.model.parameters()] == [id(p) for _, p in named],
        "offsets": {name: p.storage_offset() for name, p in named},
        "parameters_between": between,
        "norms": torch.stack(norms),
        "norm": torch.as_tensor(engine.get_global_grad_norm()),
        "stage": engine.zero_optimization_stage(),
        "keeps_the_optimizer": engine.optimizer.optimizer is recorder,
    }
