"""Model folders from elsewhere: no pickles, no code, no question, no path out of the folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from epochal.models.files import architecture_difference, check_folder, open_model
from epochal.models.llama import build_model

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(autouse=True)
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("a question was asked on standard input")

    monkeypatch.setattr("builtins.input", asked)


def folder_with(folder: Path, config: Any = LLAMA, *files: str) -> Path:
    """Write a model folder with a config and the named files, `model.safetensors` if none is named."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in files or ("model.safetensors",):
        if name.endswith(".safetensors"):
            save_file({"x": torch.zeros(1)}, folder / name)
        else:
            (folder / name).write_text("raise SystemExit('code of the folder ran')")
    return folder


def ensemble(folder: Path, *members: Any) -> Path:
    return folder_with(folder, {"model_type": "epochal_ensemble", "members": list(members)}, "README.md")


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        (
            LLAMA,
            ["pytorch_model.bin"],
            r"holds pickled weights \(pytorch_model\.bin\), which are never loaded; open it with",
        ),
        (LLAMA, ["pytorch_model-00001-of-00002.bin"], "holds pickled weights"),
        (LLAMA, ["model.pt"], "holds pickled weights"),
        (LLAMA, ["README.md"], r"holds no weights \(\*\.safetensors\)"),
        (
            {**LLAMA, "auto_map": {"AutoConfig": "evil.Evil"}},
            [],
            r"names code of its own \(auto_map\), which is never run",
        ),
        ({**LLAMA, "attn_implementation": "hub/kernel"}, [], "loads code from 'hub/kernel'"),
        ({**LLAMA, "_attn_implementation": "hub/kernel:fast"}, [], "loads code from 'hub/kernel:fast'"),
        (LLAMA, ["model.safetensors", "adapter_config.json"], "holds an adapter of another model"),
        ("[1]", [], "must hold a JSON object, got list"),
        ("{", [], "is not valid JSON"),
        ("[" * 100_000, [], "is not valid JSON"),
        ({"model_type": "martian"}, [], "cannot be opened as a model"),
        ({"model_type": "llama", "hidden_size": "wide"}, [], "cannot be opened as a model"),
    ],
)
def test_a_folder_that_must_not_be_opened_is_one_sentence(
    tmp_path: Path, config: Any, files: list[str], message: str
) -> None:
    folder = folder_with(tmp_path / "model", config, *files)
    with pytest.raises(ValueError, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_model_with_code_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    with pytest.raises(ValueError, match="names code of its own"):
        check_folder(folder)
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        check_folder(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["{outside}", "../outside", "owner/model", "member-00/..", ".", "", 3, "missing"])
def test_an_ensemble_folder_cannot_name_members_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_with(tmp_path / "outside")
    folder_with(tmp_path / "owner" / "model")
    member = name.format(outside=tmp_path / "outside") if isinstance(name, str) else name
    folder = ensemble(tmp_path / "ensemble", "member-00", member)
    folder_with(folder / "member-00")
    with pytest.raises(ValueError, match="which is not a folder inside of it; export the ensemble again"):
        open_model(folder)


def test_members_that_point_elsewhere_nest_or_hold_pickles_are_refused(tmp_path: Path) -> None:
    folder_with(tmp_path / "outside")
    folder = ensemble(tmp_path / "linked", "member-00")
    (folder / "member-00").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="not a folder inside of it"):
        check_folder(folder)
    folder = ensemble(tmp_path / "nested", "member-00")
    ensemble(folder / "member-00", "member-00")
    with pytest.raises(ValueError, match="is an ensemble inside of one"):
        check_folder(folder)
    folder = ensemble(tmp_path / "pickled", "member-00")
    folder_with(folder / "member-00", LLAMA, "pytorch_model.bin")
    with pytest.raises(ValueError, match="member-00 holds pickled weights"):
        check_folder(folder)
    with pytest.raises(ValueError, match="must name members"):
        check_folder(ensemble(tmp_path / "empty"))


def test_a_saved_model_is_opened_in_evaluation_mode(tmp_path: Path) -> None:
    model = build_model("w16", vocab_size=64, max_positions=32, seed=0)
    model.save_pretrained(tmp_path)
    opened, rows = open_model(tmp_path), torch.arange(8)[None]
    assert not opened.training and torch.equal(opened(rows).logits, model.eval()(rows).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads is 2 in one and 4 in the other"),
        ({"rope_theta": 500_000.0}, "rope_theta of the rotary embedding is 10000.0 in one and 500000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "factor of the rotary embedding is None"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_models_of_equal_shapes_are_compared_by_their_settings(change: dict[str, Any], message: str) -> None:
    one = {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10_000}
    assert architecture_difference(one, {**one, "vocab_size": 7}) is None
    as_transformers_5 = {**one, "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}}
    del as_transformers_5["rope_theta"]
    assert architecture_difference(one, as_transformers_5) is None
    assert message in str(architecture_difference(one, {**one, **change}))
