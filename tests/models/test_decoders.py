"""Every architecture at toy size: counted, drawn, trained, resumed, ensembled, exported and read back."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from campaigns import Campaign
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from epochal.campaign import worker
from epochal.campaign.init import Request, init
from epochal.campaign.plan import campaign_jobs, load_recipe, partition_jobs
from epochal.data.store import open_store
from epochal.evaluation.ensembles import evaluate_ensemble
from epochal.export.gguf import write_gguf
from epochal.export.huggingface import export
from epochal.loss import cross_entropy
from epochal.meaning import meaning_of
from epochal.models.config import check_run, flops_per_token, parameter_counts, read_config
from epochal.models.folder import save_model
from epochal.models.layers import apply_modes
from epochal.models.llama import build_model, next_token, start_from
from epochal.optim.build import parameter_groups
from epochal.optim.roles import decoder_layers, head_weight, parameter_roles
from epochal.records import Workspace, load_records, write_record
from epochal.run import AdamW, Ensemble, Fira, Muon, Run, Samples
from epochal.scale import load_scale
from epochal.stopping import Stopped
from epochal.study import Study
from epochal.training.loop import train
from epochal.training.noise import Noise

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen3": {**GROUPED, "head_dim": 8},
    "olmo2": GROUPED,
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "gemma3_text": {**GROUPED, **WINDOWS, "head_dim": 8},
    "gpt_neox": SIZES,
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
}
OWN_KEYS = {"vocab_size": 96, "initialisation": "gpt2"}

every_model = pytest.mark.parametrize("kind", MODELS)


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **OWN_KEYS, **MODELS[kind], **changes}


def built(kind: str, **changes: Any) -> Any:
    return build_model(config_of(kind, **changes), vocab_size=96, max_positions=32, seed=0, eos_token_id=1)


def rows(count: int = 3) -> torch.Tensor:
    return torch.randint(96, (count, 32), generator=torch.Generator().manual_seed(0))


# --- counts and roles ---------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_counts_are_those_of_transformers(kind: str, tied: bool) -> None:
    model, counts = built(kind, tie_word_embeddings=tied), parameter_counts(config_of(kind, tie_word_embeddings=tied))
    ends = {model.get_input_embeddings().weight, head_weight(model)}
    positions = model.transformer.wpe.weight.numel() if kind == "gpt2" else 0
    total = sum(parameter.numel() for parameter in model.parameters())
    assert counts == (total, total - positions - sum(weight.numel() for weight in ends)), f"{kind} is counted wrongly"
    default = {key: value for key, value in config_of(kind).items() if key != "num_key_value_heads"}
    default |= {"num_attention_heads": 32, "hidden_size": 64} if kind in ("mistral", "qwen3") else {}
    whole = build_model(default, vocab_size=96, max_positions=32, seed=0)
    assert parameter_counts(default).total == sum(p.numel() for p in whole.parameters()), "a default is another"


@every_model
def test_flops_count_every_multiplied_matrix(kind: str) -> None:
    model = built(kind)
    matrices = [p for name, p in model.named_parameters() if parameter_roles(model)[name] in ("linear", "residual")]
    multiplied = sum(p.numel() for p in matrices) + head_weight(model).numel()
    attention = 12 * 2 * 4 * (8 if "head_dim" in MODELS[kind] else 6) * 32
    flops = flops_per_token(config_of(kind), 32) - attention
    assert 6 * multiplied <= flops <= 6.6 * multiplied, "only norms and biases are counted on top of the matrices"


@every_model
def test_roles_are_found_by_structure(kind: str) -> None:
    """The maps into the residual stream are those that change the output of a layer when they are zero."""
    model = built(kind).double()
    roles = parameter_roles(model)
    assert set(roles) == dict(model.named_parameters()).keys() and "other" not in roles.values()
    assert sum(role == "residual" for role in roles.values()) == 2 * len(decoder_layers(model))
    zero = [model.get_parameter(name) for name, role in roles.items() if role == "residual"]
    zero += [model.get_parameter(name) for name, role in roles.items() if role == "bias"]
    with torch.no_grad():
        for parameter in zero:
            parameter.zero_()
        layers = model.base_model(rows(), output_hidden_states=True).hidden_states
    assert torch.equal(layers[0], layers[1]), f"{kind}: a layer adds something though its outputs are zero"


@every_model
def test_weights_follow_the_roles(kind: str) -> None:
    model = built(kind, initialisation="infinite-compute")
    roles, width = parameter_roles(model), 24
    for name, weight in model.named_parameters():
        match roles[name]:
            case "norm":
                expected = 0.0 if kind == "gemma3_text" else 1.0
                assert torch.equal(weight, torch.full_like(weight, expected)), name
            case "bias":
                assert not weight.any(), name
            case "embedding":
                assert weight.std().item() * width == pytest.approx(0.98658, rel=0.15), name
            case _:
                fan_in = weight.shape[0] if kind == "gpt2" and roles[name] != "head" else weight.shape[1]
                assert weight.std().item() * math.sqrt(fan_in) == pytest.approx(0.98658, rel=0.15), name


@every_model
def test_a_new_model_is_scaled_like_one_of_transformers(kind: str) -> None:
    """Norms of a new model change nothing: each is that of transformers' own initialisation."""
    config = built(kind).config
    theirs = {name: p for name, p in AutoModelForCausalLM.from_config(config).named_parameters() if p.ndim == 1}
    ours = {name: p for name, p in built(kind).named_parameters() if p.ndim == 1}
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@every_model
def test_decay_is_for_linear_maps_and_the_head(kind: str) -> None:
    model = built(kind)
    roles = parameter_roles(model)
    groups = {group["decay_scale"]: set(group["param_names"]) for group in parameter_groups(model, 0.1)}
    assert groups[1.0] == {name for name, role in roles.items() if role in ("linear", "residual", "head")}
    assert groups[0.0] == {name for name, role in roles.items() if role in ("embedding", "norm", "bias")}


# --- losses -------------------------------------------------------------------------------------------------------------


@every_model
def test_the_loss_is_that_of_the_whole_model_in_float64(kind: str) -> None:
    model, tokens = built(kind).double(), rows()
    logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    # transformers computes its own loss in float32.
    assert model(input_ids=tokens, labels=tokens).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    # Without masks, as in training.
    apply_modes(model, (), torch.device("cpu"), lambda: None)
    hidden, targets = next_token(model, tokens)
    loss = cross_entropy(hidden, head_weight(model), targets, normaliser=len(targets))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert worst < 1e-6, f"{kind}: gradients differ by {worst}"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
@every_model
def test_layers_are_compiled_whole_and_recomputed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is one graph; the graphs are computed eagerly here, so nothing is rounded otherwise."""
    monkeypatch.setattr("epochal.models.layers.COMPILER", "eager")
    losses, gradients = [], []
    for modes in ((), ("compile", "recompute")):
        model = built(kind)
        apply_modes(model, modes, torch.device("cpu"), lambda: (nullcontext(), nullcontext()))
        hidden, targets = next_token(model, rows())
        losses.append(cross_entropy(hidden, head_weight(model), targets, normaliser=len(targets)))
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    assert torch.equal(*losses) and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@every_model
def test_dropout_is_at_the_residual_outputs(kind: str) -> None:
    model, noise = built(kind), Noise(seed=0, dropout=0.5, input_mask_prob=0.0)
    noise.attach(model.train())
    sites = {name for name, module in model.named_modules() if hasattr(module, "dropout_share")}
    roles = parameter_roles(model)
    assert {f"{site}.weight" for site in sites} == {
        name for name, role in roles.items() if role == "residual" or (role == "embedding" and "wpe" not in name)
    }
    noise.begin(range(3))
    first = next_token(model, rows())[0]
    assert not torch.equal(first, next_token(model.eval(), rows())[0])


# --- the whole life of a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    workspace, _, config = tiny.workspace(tmp_path_factory.mktemp("decoders"))
    return workspace, config


def a_run(space: tuple[Workspace, Path], kind: str, **changes: Any) -> Run:
    workspace, config = space
    path = workspace.work / f"{kind}.json"
    path.write_text(json.dumps(config_of(kind)))
    return tiny.run(config, model=str(path), epochs=1, num_evals=2, **changes)


def stopping_at(step: int) -> Callable[[], str | None]:
    calls = iter([None] * (step - 1) + ["on request"] + [None] * 99)
    return lambda: next(calls)


@every_model
def test_models_train_resume_average_and_leave(
    kind: str, space: tuple[Workspace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, _ = space
    optimizer = Muon(lr=0.01, wd=0.1) if kind == "gpt2" else AdamW(lr=0.01, wd=0.1)
    runs = [a_run(space, kind, name=f"{kind}-{seed}", init_seed=seed, optimizer=optimizer) for seed in (0, 1)]
    runs.append(replace(runs[0], name=f"{kind}-cut"))
    stop = stopping_at(7)
    for run in runs:
        if run.name.endswith("cut"):
            monkeypatch.setattr("epochal.training.loop.stop_reason", stop)
            with pytest.raises(Stopped, match="at step 7 of 16"):
                train(run, workspace)
            newest = max((workspace.folder(run.name) / "checkpoints").glob("step-*"))
            saved = AutoModelForCausalLM.from_pretrained(newest).state_dict()
            stored = load_file(newest / "model.safetensors")
            assert stored and all(torch.equal(saved[name], weight) for name, weight in stored.items())
        record = train(run, workspace)
        assert record is not None and record.results["curve"][-1][1] < record.results["curve"][0][1] < 6.0
        write_record(workspace, record)
    records = load_records(workspace)
    whole, cut = (records.named(f"{kind}-{which}") for which in (0, "cut"))
    assert whole and cut and cut.results == whole.results, f"{kind}: a resumed run differs"
    weights = [load_file(workspace.folder(name) / "model/model.safetensors") for name in (f"{kind}-0", f"{kind}-cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    both = Ensemble(name=f"{kind}-both", runs=(f"{kind}-0", f"{kind}-1"), average="logits")
    record = evaluate_ensemble(both, workspace, records)
    write_record(workspace, record)
    single = [records.named(name).loss for name in both.runs]  # type: ignore[union-attr]
    assert record.loss < sum(single) / 2, "the mean of logits has a lower loss than the mean of losses"
    tokens = torch.arange(64).reshape(2, 32)
    logits = []
    for name in (f"{kind}-0", f"{kind}-1", both.name):
        export(name, tmp_path / name, workspace, load_records(workspace))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.max_position_embeddings == (64 if kind == "gpt2" else 32)
        logits.append(model.eval()(tokens).logits)
        if name != both.name:
            assert read_config(tmp_path / name)["model_type"] == kind, "an exported folder is a model file"
    assert (logits[2] - (logits[0] + logits[1]) / 2).abs().max() < 1e-5
    generated = model.generate(tokens[:, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] <= 7


@pytest.mark.parametrize("kind", ["qwen3", "olmo2"])
def test_a_whole_campaign_runs(kind: str, campaign: Campaign) -> None:
    """Searches, members, an ensemble, text sampled from it, and students, by the worker that every campaign uses."""
    (campaign.folder / f"{kind}.json").write_text(json.dumps(config_of(kind)))
    campaign.rewrite('"w16"', f'"{campaign.folder / f"{kind}.json"}"')
    campaign.rewrite("epochs = [1, 2]", "epochs = [1]")
    events: list[dict[str, Any]] = []
    assert worker.work(campaign.worker_config("distillation"), events.append) == 0, events
    records = campaign.records
    jobs = campaign_jobs(["distillation"], records, campaign.scale)
    assert {type(job) for job in jobs} == {Run, Ensemble, Samples} and partition_jobs(jobs, records).done == tuple(jobs)
    assert {read_config(job.model)["model_type"] for job in jobs if isinstance(job, Run)} == {kind}
    students = [records.get(job) for job in jobs if isinstance(job, Run) and job.distill]
    assert students and all(record and record.status == "done" and record.loss < 6.0 for record in students)
    assert load_recipe("distillation").report(Study(records, campaign.scale)).claims


@pytest.mark.parametrize("kind", MODELS)
def test_gguf_is_written_where_it_can_be(kind: str, space: tuple[Workspace, Path], tmp_path: Path) -> None:
    """transformers' own reader restores the model; other architectures are refused."""
    pytest.importorskip("gguf")
    workspace, config = space
    store = open_store(str(config), workspace)
    # transformers' reader has the default width of a head of Qwen3.
    keys = config_of(kind) | {"qwen3": {"head_dim": 128}, "mistral": {"sliding_window": None}}.get(kind, {})
    model = build_model(keys, vocab_size=store.vocab_size, max_positions=32, seed=0, eos_token_id=1).eval()
    save_model(model, store.tokenizer_folder, tmp_path / "model")
    (tmp_path / "alone").mkdir()
    path = tmp_path / "alone" / "model.gguf"
    if kind not in ("llama", "mistral", "qwen3"):
        with pytest.raises(
            ValueError, match="--gguf supports only LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM, got"
        ):
            write_gguf(tmp_path / "model", path, name="toy")
        return
    write_gguf(tmp_path / "model", path, name="toy")
    again = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    assert (again(rows()).logits - model(rows()).logits).abs().max() <= 1e-5
    if kind == "mistral":
        save_model(built(kind), store.tokenizer_folder, tmp_path / "window")
        with pytest.raises(ValueError, match="--gguf does not support sliding_window = 8; leave --gguf out"):
            write_gguf(tmp_path / "window", tmp_path / "x.gguf", name="toy")


# --- models from elsewhere ----------------------------------------------------------------------------------------------


def foreign_model(kind: str, folder: Path, tokenizer: Path, vocabulary: int) -> Any:
    """Save a model as others do: padded, with dropout, several end tokens and no initialisation; returns it."""
    from transformers import CONFIG_MAPPING

    keys = config_of(kind, vocab_size=vocabulary)
    del keys["initialisation"]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**keys))
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    table = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 2], "_name_or_path": "made up"}
    table |= {key: 0.1 for key in NO_DROPOUT if kind == "gpt2"}
    if kind == "gpt_neox":  # as older versions write it
        table |= {"rotary_pct": table.pop("rope_parameters")["partial_rotary_factor"], "rotary_emb_base": 10000}
    (folder / "config.json").write_text(json.dumps(table))
    stored = load_file(folder / "model.safetensors")
    if kind in ("gpt2", "gpt_neox"):
        older = {name.removeprefix("transformer.").replace("lm_head", "embed_out"): w for name, w in stored.items()}
        save_file(older, folder / "model.safetensors")
    return model


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_neox", "gpt2"])
def test_a_run_starts_from_a_model_of_the_hub(
    kind: str, space: tuple[Workspace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With its weights, its tokenizer and without the rows that pad its vocabulary; another vocabulary is refused."""
    workspace, config = space
    store = open_store(str(config), workspace)
    cache = tmp_path / "models--some--model"
    folder = cache / "snapshots" / "0123"
    theirs = foreign_model(kind, folder, store.tokenizer_folder, store.vocab_size + 12)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    run = tiny.run(config, name=f"{kind}-begun", model=str(folder), init_from="some/model")
    model = build_model(run.model, vocab_size=store.vocab_size, max_positions=32, seed=0)
    start_from(run, model, workspace, store.tokenizer_folder)
    assert "12 rows of the vocabulary" in caplog.text
    tokens = rows() % store.vocab_size
    expected = theirs.eval()(tokens).logits[..., : store.vocab_size]
    assert torch.equal(model.eval()(tokens).logits, expected), f"{kind}: another model than the one it starts from"
    assert meaning_of(run, workspace, load_records(workspace))["files"]["weights to start from"]

    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="cannot start from 'some/model': 2 tokens differ"):
        start_from(run, model, workspace, store.tokenizer_folder)
    with pytest.raises(ValueError, match="some/other is neither a folder nor a model that can be had"):
        start_from(replace(run, init_from="some/other"), model, workspace, store.tokenizer_folder)


def test_init_goes_on_from_a_model_of_another_architecture(
    space: tuple[Workspace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, config = space
    monkeypatch.chdir(tmp_path)
    store = open_store(str(config), workspace)
    foreign_model("qwen3", tmp_path / "theirs", store.tokenizer_folder, store.vocab_size + 12)
    Path("text.txt").write_text("\n\n".join(tiny.documents(600)))
    init(Request(name="own", files=("text.txt",), seconds=600, device="cpu", work=Path("work"), start="theirs"))
    scale = load_scale("own")
    jobs = campaign_jobs(["best_model"], load_records(Workspace("own", Path("results"), Path("work"))), scale)
    begun = [job for job in jobs if isinstance(job, Run)]
    assert begun and {(job.model, job.init_from) for job in begun} == {("./theirs", "./theirs")}
    assert open_store("own", Workspace("own", Path("results"), Path("work"))).vocabulary == store.vocabulary


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gemma3_text",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0, but capped logits are not",
        ),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0, but capped attention scores",
        ),
        ("gpt2", {"resid_pdrop": 0.1}, "resid_pdrop must be a number equal to 0, got 0.1"),
        ("gpt2", {"n_head": 5}, "n_embd 24 is not a multiple of n_head 5; use 4 heads"),
        ("gpt2", {"hidden_size": 24}, "unknown key 'hidden_size'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is true, but biases are not supported; set it to false"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'; choose from llama, mistral, qwen3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parameter_counts(read_config(config_of(kind, **changes)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"optimizer": Fira(lr=0.01)}, "stored transposed, which Fira would project on the wrong side"),
        ("gpt2", {"sequence_length": 128}, "has 64 positions; use sequences of at most as many tokens, not 128"),
        ("qwen3", {"residual": "bfloat16", "precision": "bf16"}, "is a qwen3, whose layers widen a residual stream"),
    ],
)
def test_runs_that_cannot_be_are_refused_when_they_are_planned(
    kind: str, changes: dict[str, Any], message: str, space: tuple[Workspace, Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(a_run(space, kind, **changes))


def test_experts_in_one_tensor_have_no_role() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.zeros(4, 3, 3))

    assert parameter_roles(Experts()) == {"up": "other"}
