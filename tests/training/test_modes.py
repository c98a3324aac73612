"""Execution modes change the speed of a run and not its numbers; each is compared with the plain computation."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from epochal.models import layers
from epochal.models.llama import build_model, next_token
from epochal.records import Workspace
from epochal.run import AdamW, Run
from epochal.stopping import Stopped
from epochal.training import cuda_graph, loop
from epochal.training.loop import ModelWithLoss, RuntimeOptions, train
from epochal.training.noise import Noise
from epochal.training.step import TrainingStep

TOKENS = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
# torch's own, while it traces a tensor that another layer computed.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
needs_compiler = pytest.mark.skipif(not layers.has_compiler(CPU), reason="torch.compile needs a C++ compiler")


def model_with_loss(
    modes: tuple[str, ...] = (),
    precision: str = "fp32",
    dropout: float = 0.0,
    mask: float = 0.0,
    residual: bool = False,
) -> ModelWithLoss:
    model = build_model("w16", vocab_size=300, max_positions=32, seed=0)
    noise = Noise(seed=3, dropout=dropout, input_mask_prob=mask)
    noise.attach(model)
    if residual:
        layers.use_bf16_residual(model)
    layers.apply_modes(model, modes, CPU, noise.recomputing)
    return ModelWithLoss(model, noise, None, precision).train()


def gradients(module: ModelWithLoss) -> list[torch.Tensor]:
    """The loss and all gradients of one micro-batch."""
    module.zero_grad()
    loss = module(TOKENS, 8, 124)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def error(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], dict[str, int]]]:
    """Compile with a backend that computes eagerly; yields the numbers of graphs and of graph breaks."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(layers, "COMPILER", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield lambda: {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    torch._dynamo.reset()


# --- noise ------------------------------------------------------------------------------------------------------------


def test_the_masks_of_dropout_are_those_of_a_generator_for_each_row_and_site() -> None:
    """Committed records with dropout were trained with these numbers."""
    module = model_with_loss(dropout=0.25)
    inputs: list[torch.Tensor] = []
    embedding = module.model.model.embed_tokens
    embedding.register_forward_hook(lambda _m, _i, output: inputs.append(output.detach()))
    module(TOKENS, 8, 124)
    for row in range(4):
        key = f"3/{8 + row}/plain/model.embed_tokens".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big"))
        kept = torch.rand((32, 16), generator=generator) >= 0.25
        torch.testing.assert_close(inputs[0][row], embedding.weight[TOKENS[row]].detach() * kept / 0.75)


def test_the_gradient_of_dropout_has_the_mask_of_its_forward_pass() -> None:
    from triton_kernels.row_dropout import row_dropout

    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    seeds = torch.tensor([5, 2**32 - 1, 0])
    torch.autograd.gradcheck(lambda x: row_dropout(x, seeds, torch.tensor(0.4)), x)
    torch.library.opcheck(row_dropout, (x, seeds, torch.tensor(0.4)), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(ValueError, match=r"seeds \(3,\) and p 1.5 for x"):
        row_dropout(x, seeds, torch.tensor(1.5))


def test_recomputed_layers_give_the_same_bits_with_dropout_and_masked_inputs_together() -> None:
    """The second pass has other seeds, and the first is recomputed after it."""
    noisy = {"dropout": 0.1, "mask": 0.5}
    for precision in ("fp32", "bf16"):
        plain = gradients(model_with_loss(precision=precision, **noisy))
        assert equal(gradients(model_with_loss(("recompute",), precision, **noisy)), plain)


# --- attention --------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the values that the host reads from a device, each of which waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_training_forward_pass_builds_no_mask_reads_no_value_and_has_the_same_bits() -> None:
    model = build_model("w16", vocab_size=300, max_positions=32, seed=0)
    with Reads() as before:
        plain = next_token(model, TOKENS)[0]
    layers.use_causal_attention(model)
    with Reads() as after:
        assert torch.equal(next_token(model, TOKENS)[0], plain)
    assert before.count and not after.count
    assert "epochal" not in model.config.to_json_string()


# --- compiled layers --------------------------------------------------------------------------------------------------


def qwen() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8,
        )
    )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: build_model("w16", vocab_size=300, max_positions=32, seed=0), qwen])
def test_layers_of_a_decoder_are_one_graph_without_breaks(make: Callable[[], Any], traced: Any) -> None:
    model = make()
    layers.use_causal_attention(model)
    expected = next_token(model, TOKENS)[0]
    layers.compile_layers(model, CPU)
    result = next_token(model, TOKENS)[0]
    result.sum().backward()
    torch.testing.assert_close(result, expected)
    assert traced() == {"graphs": 2, "breaks": 0}, "one graph for all layers, one for the last norm"
    with layers.eager(("compile",)), torch.no_grad():
        next_token(model, TOKENS[:, :16])
    assert traced()["graphs"] == 2, "evaluation is not compiled"


def test_graphs_of_models_with_and_without_dropout_are_not_confused(traced: Any) -> None:
    noisy = {"dropout": 0.1, "mask": 0.5}
    plain, dropped = gradients(model_with_loss()), gradients(model_with_loss(**noisy))
    assert equal(gradients(model_with_loss(("compile",))), plain)
    assert equal(gradients(model_with_loss(("compile",), **noisy)), dropped)
    assert equal(gradients(model_with_loss(("compile", "recompute"), **noisy)), dropped)
    assert equal(gradients(model_with_loss(("compile", "fused"))), gradients(model_with_loss(("fused",))))
    assert equal(gradients(model_with_loss(("compile",))), plain)
    assert traced()["breaks"] == 0


@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # where torch imports its compiler
def test_compiled_layers_differ_by_rounding_and_a_stopped_run_resumes_bit_identically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    exact, rounded = gradients(model_with_loss()), gradients(model_with_loss((), "bf16"))
    assert error(gradients(model_with_loss(("compile",), "bf16")), rounded) < 0.1 * error(rounded, exact)

    space, _, config = tiny.workspace(tmp_path)
    changes: dict[str, Any] = {"epochs": 1, "precision": "bf16", "num_evals": 1}
    eager = trained(tiny.run(config, name="eager", **changes), space)
    options = RuntimeOptions(modes=("compile",))
    whole = trained(tiny.run(config, name="whole", **changes), space, options)
    assert whole["provenance"]["modes"] == ["compile"] and eager["provenance"]["modes"] == []
    assert whole["results"]["loss"] == pytest.approx(eager["results"]["loss"], abs=5e-3)
    polls = itertools.count(1)
    run = tiny.run(config, name="cut", **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_reason", lambda: "test" if next(polls) == 7 else None)
        with pytest.raises(Stopped):
            train(run, space, options)
    assert trained(run, space, options)["results"] == whole["results"]


def trained(run: Run, space: Workspace, options: RuntimeOptions | None = None) -> dict[str, Any]:
    record = train(run, space, options or RuntimeOptions())
    assert record is not None
    return {"results": record.results, "provenance": record.provenance}


# --- the other modes --------------------------------------------------------------------------------------------------


def test_a_graph_of_forward_and_backward_replays_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU replaying calls the function again: the buffers, gradients and losses are those of a graph."""
    space, _, config = tiny.workspace(tmp_path)
    changes: dict[str, Any] = {"epochs": 1, "optimizer": AdamW(lr=1e-2)}
    eager = trained(tiny.run(config, name="eager", **changes), space, RuntimeOptions(micro_batch=2))
    recorded: list[Callable[[], None]] = []

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        for _ in range(cuda_graph.WARM_UP + 1):
            function()  # a capture's own passes leave gradients behind
        recorded.append(function)
        return function

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(loop, "check_modes", lambda *_, **__: None)
    options = RuntimeOptions(micro_batch=2, modes=("cuda-graph",))
    assert trained(tiny.run(config, name="graph", **changes), space, options)["results"] == eager["results"]
    assert len(recorded) == 1


def test_fused_products_change_gradients_by_rounding_and_no_name_or_shape() -> None:
    plain, fused = model_with_loss(), model_with_loss(("fused",))
    assert error(gradients(fused), gradients(plain)) < 1e-5
    shapes = [{name: value.shape for name, value in each.model.state_dict().items()} for each in (plain, fused)]
    assert shapes[0] == shapes[1]


def test_a_bf16_residual_stream_is_bf16_and_as_exact_as_bf16_is() -> None:
    module = model_with_loss(precision="bf16", residual=True)
    streams: list[torch.dtype] = []
    for layer in module.model.model.layers:
        layer.register_forward_hook(lambda _m, _i, output: streams.append(output.dtype))
    narrow, wide, exact = gradients(module), gradients(model_with_loss((), "bf16")), gradients(model_with_loss())
    assert set(streams) == {torch.bfloat16}
    assert not equal(narrow, wide) and error(narrow, exact) < 3 * error(wide, exact)
    with pytest.raises(ValueError, match='residual "bfloat16" needs precision "bf16", got \'fp32\''):
        tiny.run(Path("tiny.toml"), residual="bfloat16")


def test_the_mode_deterministic_is_set_for_its_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _, config = tiny.workspace(tmp_path)
    seen: list[tuple[bool, bool]] = []
    step = TrainingStep.__call__

    def watched(*arguments: Any) -> Any:
        flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
        seen.append(flags)
        return step(*arguments)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    results = []
    for name, modes in (("on", ("deterministic",)), ("off", ())):
        run = tiny.run(config, name=name, epochs=1, precision="bf16")
        results.append(trained(run, space, RuntimeOptions(modes=modes))["results"])
    assert seen == [(True, False)] * 16 + [(False, True)] * 16
    assert results[0] == results[1]
