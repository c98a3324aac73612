"""Open a model folder: safetensors only, no code of the folder, no question on standard input."""

import json
from pathlib import Path
from typing import Any

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


def open_config(folder: str | Path) -> Any:
    """Open the config of a model folder or hub name, as `open_model` does."""
    from transformers import AutoConfig

    local = Path(folder).is_dir()
    if local:
        check_folder(Path(folder))
    with _sentences(folder):
        return AutoConfig.from_pretrained(str(folder), local_files_only=local, trust_remote_code=False)


def check_folder(folder: Path) -> None:
    """Raise ValueError for a folder that must not be opened, or holds no model.

    Refused are pickled weights, code of the folder (auto_map), attention kernels named by a hub name, and adapters, which
    name the model that they change by a path or hub name.
    """
    config = read_model_config(folder)
    if "auto_map" in config:
        raise ValueError(
            f"{folder}/config.json names code of its own (auto_map), which is never run; use a model of transformers itself, "
            "or remove the key if its model_type is one."
        )
    for key in ("_attn_implementation", "attn_implementation"):
        if "/" in str(config.get(key, "")):
            raise ValueError(f"{folder}/config.json loads code from {config[key]!r} ({key}), which is never run; remove it.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter of another model; merge the two, and give the folder of the merged one.")
    if config.get("model_type") != "epochal_ensemble":
        weight_files(folder)


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


class _sentences:  # noqa: N801  # used as a function
    """Context in which errors of transformers become sentences with the folder's name."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from safetensors import SafetensorError

        if not isinstance(error, OSError | ValueError | KeyError | SafetensorError):
            return
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            reason = "it needs code of its own, which is never run"
        else:
            reason = text.splitlines()[0] if text else type(error).__name__
        raise ValueError(f"{self.folder} cannot be opened as a model ({reason}); check the folder.") from None
