"""The decay mask of the paper and AdamW's step, exactly."""

import pytest
import torch

from epochal.model import build_model
from epochal.optim.build import build_adamw, parameter_groups


def model() -> torch.nn.Module:
    return build_model("w16", vocab_size=64, max_positions=32, seed=0)


def is_decayed(name: str) -> bool:
    return "norm" not in name and "embed_tokens" not in name


def test_the_mask_is_every_linear_map_and_the_head() -> None:
    subject = model()
    decayed, kept = parameter_groups(subject, 0.3)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in subject.named_parameters()}
    found = {names[id(parameter)] for parameter in decayed["params"]}
    assert found == {name for name in names.values() if is_decayed(name)}
    assert "lm_head.weight" in found and "model.layers.1.mlp.down_proj.weight" in found
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize(("lr", "wd"), [(1e-2, 1.6), (3e-3, 0.1), (1e-3, 0.0)])
def test_a_decay_only_step_shrinks_by_lr_times_wd(lr: float, wd: float) -> None:
    subject = model()
    before = {name: parameter.detach().clone() for name, parameter in subject.named_parameters()}
    optimizer = build_adamw(subject, lr=lr, wd=wd, betas=(0.9, 0.95), eps=1e-8)
    for parameter in subject.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in subject.named_parameters():
        factor = 1.0 - lr * wd if is_decayed(name) else 1.0
        expected = before[name].double() * factor
        # Exact up to the one rounding of the product to float32, and of the factor.
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=2**-22, atol=0.0)
        if not is_decayed(name):
            assert torch.equal(parameter.detach(), before[name])


def test_ten_steps_equal_the_formula_in_float64() -> None:
    lr, wd = 1e-2, 0.8
    subject = model()
    optimizer = build_adamw(subject, lr=lr, wd=wd, betas=(0.9, 0.95), eps=1e-8)
    weights = {name: parameter.detach().double() for name, parameter in subject.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 11):
        for name, parameter in subject.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            first[name] = 0.9 * first[name] + 0.1 * gradient.double()
            second[name] = 0.95 * second[name] + 0.05 * gradient.double() ** 2
            direction = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = wd * weights[name] if is_decayed(name) else 0.0
            weights[name] = weights[name] - lr * (direction + decay)
        optimizer.step()
    for name, parameter in subject.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), weights[name], rtol=1e-5, atol=1e-6)
