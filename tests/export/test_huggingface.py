"""Exported folders: same logits, model card, record, and GGUF read back by other readers."""

import ast
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils, pipeline
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from epochal.config import REPOSITORY
from epochal.data.store import TokenStore
from epochal.export.huggingface import _front_matter, _table, export
from epochal.models.ensemble import EnsembleForCausalLM
from epochal.models.folder import save_model
from epochal.models.llama import build_model
from epochal.models.load import RECORD, load_source
from epochal.records import Record, Records, Workspace, file_hash, load_records, write_record
from epochal.run import Ensemble, Samples, fingerprint

sys.path.append(str(REPOSITORY / "benchmarks"))

import load_elsewhere

TEXT = "And the king saw the river."


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Records, TokenStore]:
    """Three finished runs, "c" without weights, and four ensembles."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("finished"))
    provenance = {"commit": "0" * 40, "versions": {"torch": "2"}}
    for seed, name in enumerate("abc"):
        run = tiny.run(config, name=name, model="w32", init_seed=seed)
        results = {"loss": 3.25, "test_loss": 3.5, "parameters": 1000}
        write_record(space, Record(run, fingerprint(run), "done", results, provenance=provenance))
        if name != "c":
            model = build_model(
                "w32", vocab_size=store.vocab_size, max_positions=32, seed=seed, bos_token_id=0, eos_token_id=1
            )
            # Not the default base, which a reader that misses the key would use.
            model.config.rope_parameters["rope_theta"] = 500_000.0
            model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
            save_model(model, store.tokenizer_folder, space.folder(name) / "model")
    jobs = [
        Ensemble(name="both", runs=("a", "b"), average="probs", member_weights=(0.25, 0.75)),
        Ensemble(name="mean", runs=("a", "b"), average="logits"),
        Ensemble(name="soup", runs=("a", "b"), average="parameters"),
        Ensemble(name="incomplete", runs=("a", "c"), average="logits"),
    ]
    for job in jobs:
        results = {"loss": 3.0, "parameters": 2000, "members": 2, "curve": {"2": [3.0]}}
        write_record(space, Record(job, fingerprint(job), "done", results))
    text = Samples(name="text", source="a", tokens=10, max_length=10)
    write_record(space, Record(text, fingerprint(text), "done", {}))
    return space, load_records(space), store


def tokens(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids


def test_an_exported_run_gives_the_same_logits(finished: tuple[Workspace, Records, TokenStore], tmp_path: Path) -> None:
    space, records, store = finished
    export("a", tmp_path / "out" / "a", space, records)
    folder = tmp_path / "out" / "a"
    again, rows = AutoModelForCausalLM.from_pretrained(folder), tokens(folder)
    assert (again(rows).logits - load_source("a", space, records)(rows).logits).abs().max() <= 1e-5
    exact = build_model("w32", vocab_size=store.vocab_size, max_positions=32, seed=0)
    exact.model.rotary_emb = LlamaRotaryEmbedding(again.config)
    assert (again(rows).logits - exact(rows).logits).abs().max() <= 1e-5
    generated = pipeline("text-generation", model=str(folder), device="cpu")(TEXT, max_new_tokens=5, do_sample=False)
    assert generated[0]["generated_text"].startswith(TEXT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a", "both", "mean"])
def test_folders_load_without_epochal_and_in_batches(
    finished: tuple[Workspace, Records, TokenStore],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    space, records, _ = finished
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, logits = tmp_path / name, tmp_path / "logits.npy"
    export(name, folder, space, records)
    np.save(logits, load_source(name, space, records)(tokens(folder)).logits.detach().double().numpy())
    checks = load_elsewhere.main(str(folder), logits, text=TEXT)
    assert checks == 0, capsys.readouterr().out
    if name != "a":
        code = ast.parse((folder / "modeling_ensemble.py").read_text())
        imported = {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
        assert not any(str(module).startswith("epochal") for module in imported)


@pytest.mark.skipif("EPOCHAL_OTHER_PYTHON" not in os.environ, reason="EPOCHAL_OTHER_PYTHON names no other interpreter")
@pytest.mark.parametrize("name", ["a", "both", "mean"])
def test_folders_load_in_the_transformers_of_another_interpreter(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path, name: str
) -> None:
    space, records, _ = finished
    folder, logits = tmp_path / name, tmp_path / "logits.npy"
    export(name, folder, space, records)
    np.save(logits, load_source(name, space, records)(tokens(folder)).logits.detach().double().numpy())
    script = [os.environ["EPOCHAL_OTHER_PYTHON"], str(Path(load_elsewhere.__file__)), str(folder), str(logits), TEXT]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_with_the_default_settings_is_what_a_folder_says(
    finished: tuple[Workspace, Records, TokenStore],
) -> None:
    """The pad token is the end token, and Llama must still learn it: it is not in config.json."""
    space, _, _ = finished
    folder = space.folder("a") / "model"
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["pad_token_id"] is None and generation["pad_token_id"] == config["eos_token_id"] == 1
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer["tokenizer_class"], tokenizer["model_max_length"]) == ("PreTrainedTokenizerFast", 32)


@pytest.mark.parametrize(
    "licence",
    ['a "quoted" | text', "two\nlines: [x]", "<script>alert(1)</script>", "---\nend", "\u2028 \U0001f600 \x85"],
)
def test_a_licence_text_cannot_break_the_card(licence: str) -> None:
    import yaml

    text = _front_matter(licence)
    assert text.count("\n---\n") == 1 and text.endswith("---\n")
    assert yaml.safe_load(text.split("\n---\n")[0])["license_name"] == licence
    (row,) = [line for line in _table({"licence": licence}).splitlines() if line.startswith("| licence")]
    assert row.count("|") == 3 and "<" not in row


def test_the_model_card_has_losses_data_license_and_recipe(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path
) -> None:
    import yaml

    space, records, _ = finished
    export("a", tmp_path / "a", space, records)
    card = (tmp_path / "a" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license_name"] == "made up" and front["pipeline_tag"] == "text-generation"
    marks = [
        "3.2500 nats",
        "3.5000 nats",
        "made up",
        file_hash(space.records / "a.json"),
        "0" * 40,
        "optimizer.wd | 0.1",
    ]
    for mark in [*marks, "unique training tokens | 2,048", "epochs | 3"]:
        assert mark in card
    assert json.loads((tmp_path / "a" / RECORD).read_text())["job"]["name"] == "a"
    assert file_hash(tmp_path / "a" / RECORD) == file_hash(space.records / "a.json")


def test_an_exported_ensemble_gives_the_same_probabilities(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path
) -> None:
    space, records, _ = finished
    export("both", tmp_path / "both", space, records)
    again, rows = AutoModelForCausalLM.from_pretrained(tmp_path / "both"), tokens(tmp_path / "both")
    assert isinstance(again, EnsembleForCausalLM)
    members = [load_source(name, space, records)(rows).logits.double().softmax(-1) for name in "ab"]
    expected = (0.25 * members[0] + 0.75 * members[1]).log()
    assert (again(rows).logits - expected).abs().max() <= 1e-5
    card = (tmp_path / "both" / "README.md").read_text()
    assert "the mean of their probabilities" in card and "| b | weight 0.75 |" in card
    generated = pipeline("text-generation", model=again, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "both"))
    assert generated(TEXT, max_new_tokens=5)[0]["generated_text"].startswith(TEXT)


def test_an_exported_parameter_average_is_one_model(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    space, records, _ = finished
    export("soup", tmp_path / "soup", space, records, gguf=True)
    again, rows = AutoModelForCausalLM.from_pretrained(tmp_path / "soup"), tokens(tmp_path / "soup")
    one, other = (load_source(name, space, records) for name in "ab")
    with torch.no_grad():
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            mine.add_(its).mul_(0.5)
    assert (again(rows).logits - one(rows).logits).abs().max() <= 1e-5
    assert "mean parameters of 2 models" in (tmp_path / "soup" / "README.md").read_text()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}])
def test_transformers_reads_the_gguf_file(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """transformers' GGUF reader restores the model and the tokenizer."""
    pytest.importorskip("gguf")
    from transformers import LlamaForCausalLM

    from epochal.export.gguf import write_gguf

    space, records, _ = finished
    export("a", tmp_path / "a", space, records)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "a").config
    config.update(changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "alone").mkdir()
    write_gguf(tmp_path / "a", tmp_path / "alone" / "model.gguf", name="a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", gguf_file="model.gguf").eval()
    rows = tokens(tmp_path / "a")
    assert (again(rows).logits - model(rows).logits).abs().max() <= 1e-5
    read = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="model.gguf")
    text = f"{TEXT} 12 unseen wörds,\n  and spaces"
    assert (
        read(text, add_special_tokens=False).input_ids == AutoTokenizer.from_pretrained(tmp_path / "a")(text).input_ids
    )


def test_llama_cpp_reads_the_gguf_file(finished: tuple[Workspace, Records, TokenStore], tmp_path: Path) -> None:
    """With the bindings `xllamacpp`, if installed: same tokens and same next-token probabilities."""
    llama = pytest.importorskip("xllamacpp")
    space, records, store = finished
    export("a", tmp_path / "a", space, records, gguf=True)
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(tmp_path / "a" / "model.gguf"), 256, 1
    settings.flash_attn_type = (
        llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )  # flash attention runs in half precision
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server, rows = llama.Server(settings), tokens(tmp_path / "a")

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    assert ask("/tokenize", content=TEXT, add_special=False)["tokens"] == rows[0].tolist()
    answer = ask(
        "/completion", prompt=rows[0].tolist(), n_predict=1, n_probs=store.vocab_size, temperature=1.0, samplers=[]
    )
    log_probs = {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "a")(rows).logits[0, -1].log_softmax(-1)
    assert len(log_probs) > 50
    assert max(abs(chance - float(expected[token])) for token, chance in log_probs.items()) < 1e-4


def test_gguf_metadata(finished: tuple[Workspace, Records, TokenStore], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    space, records, store = finished
    export("a", tmp_path / "a", space, records, gguf=True)
    reader = gguf.GGUFReader(tmp_path / "a" / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "a").config
    assert values["general.architecture"] == "llama" and values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.bos_token_id"] == store.meta["bos"]
    assert values["llama.context_length"] == 32 and values["llama.block_count"] == config.num_hidden_layers
    assert len(values["tokenizer.ggml.tokens"]) == store.vocab_size
    assert values["tokenizer.ggml.token_type"].count(3) == 2, "the two special tokens"
    assert len(reader.tensors) == 9 * config.num_hidden_layers + 3


def test_a_failed_export_leaves_no_folder(finished: tuple[Workspace, Records, TokenStore], tmp_path: Path) -> None:
    space, records, _ = finished
    (tmp_path / "existing").mkdir()
    for name, folder, options, message in [
        ("a", "existing", {}, "exists; name a new folder"),
        ("text", "x", {}, "not a finished model"),
        ("none", "x", {}, "not a finished model"),
        ("c", "x", {}, "run 'c' again"),
        ("incomplete", "x", {}, "run 'c' again"),
        ("both", "x", {"gguf": True}, "GGUF does not support ensembles"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(name, tmp_path / folder, space, records, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["existing"]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", "LlamaForCausalLM", "GPT2LMHeadModel", "--gguf supports only LlamaForCausalLM"),
        (
            "config.json",
            '"rope_type": "default"',
            '"rope_type": "linear", "factor": 2.0',
            "does not support rope_type 'linear'",
        ),
        (
            "tokenizer.json",
            '"add_prefix_space": false',
            '"add_prefix_space": true',
            "--gguf supports only GPT-2's byte-level BPE",
        ),
    ],
)
def test_unsupported_models_and_tokenizers_raise_before_gguf_is_written(
    finished: tuple[Workspace, Records, TokenStore], tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    from epochal.export.gguf import write_gguf

    pytest.importorskip("gguf")
    space, records, _ = finished
    export("a", tmp_path / "a", space, records)
    text = (tmp_path / "a" / file).read_text()
    assert old in text
    (tmp_path / "a" / file).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "a", tmp_path / "a" / "model.gguf", name="a")
    assert not (tmp_path / "a" / "model.gguf").exists()
