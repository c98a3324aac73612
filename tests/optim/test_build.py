"""The decay mask, the exact step of AdamW, and how a Run's choice becomes the groups and options of its optimizer."""

import pytest
import torch

from epochal import optim
from epochal.distributed.sharding import Replicated
from epochal.models.llama import build_model
from epochal.optim.build import build_optimizer, parameter_groups, spectral_norms
from epochal.run import AdamW, AdEMAMix, Fira, Lion, Mars, Muon, Optimizer, Signum, Spectra


def model() -> torch.nn.Module:
    return build_model("w16", vocab_size=64, max_positions=32, seed=0)


def is_decayed(name: str) -> bool:
    return "norm" not in name and "embed_tokens" not in name


def test_linear_maps_and_the_head_decay_and_nothing_else() -> None:
    subject = model()
    decayed, others = parameter_groups(subject, 0.3)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in subject.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert decayed_names == {name for name in names.values() if is_decayed(name)}
    assert {"lm_head.weight", "model.layers.1.mlp.down_proj.weight"} <= decayed_names
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(("lr", "wd"), [(1e-2, 1.6), (3e-3, 0.1), (1e-3, 0.0)])
def test_a_decay_only_step_shrinks_by_lr_times_wd(lr: float, wd: float) -> None:
    subject = model()
    before = {name: parameter.detach().clone() for name, parameter in subject.named_parameters()}
    optimizer = build_optimizer(subject, AdamW(lr=lr, wd=wd), steps=10)
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
    optimizer = build_optimizer(subject, AdamW(lr=lr, wd=wd), steps=10)
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


# --- the other optimizers -----------------------------------------------------------------------------------------------------

HIDDEN = 2 * 7
"""Matrices in the two blocks of w16: q, k, v, o, gate, up, down."""


def one_step(choice: Optimizer, **options: object) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    subject = model()
    optimizer = build_optimizer(subject, choice, steps=10, **options)  # type: ignore[arg-type]
    give_gradients(subject)
    optimizer.step()
    return subject, optimizer


def give_gradients(subject: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in subject.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def as_a_run_steps(choice: Optimizer) -> tuple[torch.nn.Module, Replicated]:
    """Step once through `Replicated`, as a Run does on one process."""
    subject = model()
    shared = Replicated(build_optimizer(subject, choice, steps=10), subject.named_parameters())
    give_gradients(subject)
    shared.step()
    return subject, shared


@pytest.mark.parametrize(
    ("choice", "expected", "matrices"),
    [
        (AdamW(lr=0.01), torch.optim.AdamW, 0),
        (Signum(lr=0.01), optim.Signum, 0),
        (AdEMAMix(lr=0.01), optim.AdEMAMix, 0),
        (Lion(lr=0.01), optim.Lion, 0),
        (Mars(lr=0.01), optim.Mars, HIDDEN + 2),
        (Muon(lr=0.01), optim.Muon, HIDDEN),
        (Fira(lr=0.01), optim.Fira, HIDDEN),
        (Fira(lr=0.01, patterns=("q_proj", "down")), optim.Fira, 4),
        (Spectra(base=AdamW(lr=0.01)), optim.Spectra, HIDDEN + 2),
        (Spectra(base=Mars(lr=0.01), apply_to="all"), optim.Spectra, HIDDEN + 2 + 5),  # norms too, as 1 x n
        (Spectra(base=Signum(lr=0.01), apply_to=("attn", "mlp")), optim.Spectra, HIDDEN),
    ],
    ids=lambda item: type(item).__name__,
)
def test_every_kind_builds_its_class_and_finds_its_matrices(choice: Optimizer, expected: type, matrices: int) -> None:
    _, shared = as_a_run_steps(choice)
    assert type(shared._inner) is expected
    assert len(shared.matrices) == matrices


@pytest.mark.parametrize("choice", [Signum(lr=0.01, wd=0.3), Muon(lr=0.01, wd=0.3), Fira(lr=0.01, wd=0.3, rank=2)])
def test_every_optimizer_has_the_same_decay_mask(choice: Optimizer) -> None:
    subject = model()
    optimizer = build_optimizer(subject, choice, steps=10)
    scales = {id(p): group["decay_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in subject.named_parameters():
        assert scales[id(parameter)] == (1.0 if is_decayed(name) else 0.0)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.3 * group["decay_scale"]
        assert group["lr"] == 0.01


def test_fira_defaults_to_the_published_rank_and_alpha_of_the_size() -> None:
    _, optimizer = one_step(Fira(lr=0.01))
    group = next(group for group in optimizer.param_groups if "rank" in group)
    assert (group["rank"], group["alpha"], group["update_proj_gap"]) == (4, 0.25, 200)  # a quarter of w16's width
    with pytest.raises(ValueError, match="'attention'"):
        one_step(Fira(lr=0.01, patterns=("attention",)))


def test_spectra_gets_the_peak_rate_the_warmup_and_the_length_of_the_run() -> None:
    choice = Spectra(base=AdEMAMix(lr=0.01, warmup=0.5), clip=3.0, clip_decay="sqrt")
    _, optimizer = one_step(choice, warmup_steps=4)
    for group in optimizer.param_groups:
        keys = ("base_lr", "warmup_steps", "total_steps", "clip", "alpha_warmup", "beta3_warmup", "betas")
        assert [group[key] for key in keys] == [0.01, 4, 10, 3.0, 5, 5, (0.9, 0.999, 0.999)]


def test_the_options_that_ablations_change_reach_the_optimizer() -> None:
    _, spectra = one_step(Spectra(base=AdamW(lr=0.01), iterations=5))
    assert {(group["method"], group["iterations"]) for group in spectra.param_groups} == {("newton_schulz", 5)}
    _, fira = one_step(Fira(lr=0.01, scaling="matrix", gamma=None))
    assert {(group["scaling"], group["gamma"]) for group in fira.param_groups} == {("matrix", None)}
    with pytest.raises(ValueError, match="only the operator 'soft' iterates, and operator is 'hard'"):
        Spectra(base=AdamW(lr=0.01), operator="hard", iterations=5)
    with pytest.raises(ValueError, match="scaling is 'row'"):
        Fira(lr=0.01, scaling="row")


def test_every_field_of_a_config_reaches_the_class_under_its_name() -> None:
    """Values other than the defaults; `_keywords` renames only those listed there."""
    _, muon = one_step(Muon(lr=0.01, momentum=0.8, nesterov=False, iterations=3, beta1=0.7, beta2=0.6, eps=1e-5))
    expected = {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "betas": (0.7, 0.6), "eps": 1e-5}
    for group in muon.param_groups:
        assert expected.items() <= group.items() and group["adjust_lr_fn"] == "match_rms_adamw"
    _, spectra = one_step(
        Spectra(base=Mars(lr=0.01, gamma=0.5, vector_lr_scale=0.25, beta2=0.9), clip=3.0, pre_clip=2.0)
    )
    expected = {"gamma": 0.5, "vector_lr_scale": 0.25, "betas": (0.95, 0.9), "clip": 3.0, "pre_clip": 2.0}
    assert all(expected.items() <= group.items() for group in spectra.param_groups)


@pytest.mark.parametrize(("choice", "buffers"), [(Signum(lr=0.01), 1), (AdEMAMix(lr=0.01), 3), (AdamW(lr=0.01), 2)])
def test_state_bytes_are_those_of_the_buffers(choice: Optimizer, buffers: int) -> None:
    subject, shared = as_a_run_steps(choice)
    parameters = list(subject.parameters())
    assert shared.state_bytes() == 4 * sum(buffers * p.numel() + 1 for p in parameters)


def test_spectral_norms_are_the_largest_singular_values_by_kind() -> None:
    subject = model()
    norms = spectral_norms(subject)
    assert set(norms) == {
        *("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for kind, norm in norms.items():
        truth = [
            float(torch.linalg.svdvals(p.detach().double())[0])
            for name, p in subject.named_parameters()
            if f"{kind}.weight" in name
        ]
        assert norm == pytest.approx(max(truth), rel=1e-5)
