"""Open a model folder: safetensors only, no code of the folder, no question on standard input."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ENSEMBLE = "epochal_ensemble"  # the model_type of `epochal.models.ensemble`

# Weights that are Python pickles, which run code when they are loaded.
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def open_model(folder: str | Path, *, dtype: Any = None) -> Any:
    """Open the causal language model of a folder (or a hub name), in evaluation mode.

    `dtype` None keeps that of the weights. Raises ValueError for what `check_folder` refuses, and if transformers cannot
    read the folder.
    """
    from transformers import AutoModelForCausalLM

    local = Path(folder).is_dir()
    if local:
        check_folder(Path(folder))
    options = {} if dtype is None else {"dtype": dtype}
    with _sentences(folder):
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=local, trust_remote_code=False, use_safetensors=True, **options
        )
    return model.eval()


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that must not be opened, or holds no model.

    Refused are pickled weights, code of the folder (auto_map), attention kernels named by a hub name, and adapters, which
    name the model that they change by a path or hub name.
    """
    config = read_model_config(folder)
    if config.get("model_type") == ENSEMBLE:  # its class is that of epochal, whatever the folder says
        for member in _members(folder, config):
            check_folder(member)
        return
    if "auto_map" in config:
        raise ValueError(
            f"{folder}/config.json names code of its own (auto_map), which is never run; use a model of transformers itself, "
            "or remove the key if its model_type is one."
        )
    for key in ("_attn_implementation", "attn_implementation"):
        if "/" in str(config.get(key, "")):
            raise ValueError(
                f"{folder}/config.json loads code from {config[key]!r} ({key}), which is never run; remove it."
            )
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter of another model; merge the two, and give the folder of the merged one."
        )
    weight_files(folder)


def _members(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the member folders of an ensemble's folder; raises ValueError for one elsewhere, or a nested ensemble."""
    members = config.get("members")
    if not isinstance(members, list) or not members:
        raise ValueError(f"{folder}/config.json must name members, folders inside of it; export the ensemble again.")
    for member in members:
        # A folder that was downloaded must not choose what else is read.
        inside = isinstance(member, str) and (folder / member).resolve().parent == folder.resolve()
        if not inside or not (folder / member).is_dir():
            raise ValueError(
                f"{folder}/config.json names the member {member!r}, which is not a folder inside of it; export the ensemble "
                "again."
            )
        if read_model_config(folder / member).get("model_type") == ENSEMBLE:
            raise ValueError(
                f"{folder / member} is an ensemble inside of one, which is not supported; list all members."
            )
    return [folder / member for member in members]


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder; raises ValueError if it is missing or damaged."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no model: it has no config.json; give a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the folder again.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}; copy the folder again.")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; raises ValueError if there are none, or pickles instead."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0]}), which are never loaded; open it with transformers where you trust "
            "it, write it again with model.save_pretrained, and give that folder."
        )
    raise ValueError(f"{folder} holds no weights (*.safetensors); copy the folder again, or make its model again.")


# Settings that weights depend on, though no shape shows them.
_SETTINGS = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("n_head", "activation_function", "hidden_activation", "layer_norm_epsilon", "layer_norm_eps"),
    *("sliding_window", "layer_types", "no_rope_layers", "query_pre_attn_scalar", "use_parallel_residual"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)


def architecture_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Describe the first setting in which two models of equal shapes compute differently; None if there is none.

    `one` and `other` are configs as transformers writes them.
    """
    for key in _SETTINGS:
        if key in one and key in other and one[key] != other[key]:
            return f"{key} is {one[key]!r} in one and {other[key]!r} in the other"
    first, second = _rotary(one), _rotary(other)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            return f"{key} of the rotary embedding is {first.get(key)!r} in one and {second.get(key)!r} in the other"
    return None


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings, which versions of transformers write in different places."""
    table = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    table["rope_type"] = table.pop("type", None) or table.get("rope_type") or "default"
    table["rope_theta"] = float(table.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    return {key: float(value) if isinstance(value, int) else value for key, value in table.items()}


@contextmanager
def _sentences(folder: str | Path) -> Iterator[None]:
    """Turn errors of transformers into sentences with the folder's name."""
    try:
        yield
    except Exception as error:  # transformers and the libraries below raise whatever a damaged file leads to
        text = str(error) or type(error).__name__
        reason = text.splitlines()[0].rstrip(".")
        if "trust_remote_code" in text or "custom code" in text:
            reason = "it needs code of its own, which is never run"
        raise ValueError(f"{folder} cannot be opened as a model ({reason}); check the folder.") from None
