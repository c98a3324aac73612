"""Model folders that transformers 4.57 and 5, and what is built on them, read alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epochal.config import replaced_folder, write_atomic


def save_model(model: Any, tokenizer: Path, folder: Path) -> None:
    """Write a model and the files of a tokenizer folder as one Hugging Face folder."""
    # Written under another name and renamed, so that a killed process leaves no incomplete model.
    with replaced_folder(folder) as temporary:
        model.save_pretrained(temporary)
        shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        complete(temporary)


def write_settings(config: Any, tokenizer: Path, folder: Path) -> None:
    """Make a folder of bare weights, such as a checkpoint, one that transformers loads."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    config = type(config).from_dict({**config.to_dict(), "architectures": [name], "dtype": "float32"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    complete(folder)


def complete(folder: Path) -> None:
    """Add to a model folder of transformers 5 what transformers 4, batches and generation need.

    Rotary settings where 4 looks for them; a tokenizer class that both have; padding on the left with the end token; the
    longest input; the pad token in the generation config. Doing it twice changes nothing.
    """
    config = _rewrite(folder / "config.json", _rotary_settings)
    end = config.get("eos_token_id")
    if end is None:
        end = config.get("bos_token_id")
    ids = {"pad_token_id": end[0] if isinstance(end, list) else end}
    # Not in config.json: Llama gives the embedding of that token no gradient, and here it is the end token.
    _rewrite(folder / "generation_config.json", lambda table: table | ids)
    _rewrite(folder / "tokenizer_config.json", lambda table: _tokenizer_settings(table, config))


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Change a JSON file and return its table; a missing file is left out."""
    if not path.is_file():
        return {}
    table = change(json.loads(path.read_text(encoding="utf-8")))
    write_atomic(path, json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    return table


def _rotary_settings(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes one table `rope_parameters`; 4 reads `rope_theta` and `rope_scaling`, and 5 accepts both.
    rotary = dict(config.get("rope_parameters") or {})
    if "sliding_attention" in rotary:  # two tables, of which 4 knows the base of the second
        config["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = dict(rotary["full_attention"])
    theta = rotary.pop("rope_theta", None)
    if theta is not None:
        config["rope_theta"] = theta
    if rotary.get("rope_type", "default") != "default":
        config["rope_scaling"] = rotary
    return config


def _tokenizer_settings(tokenizer: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes "TokenizersBackend", which 4 does not have.
    if tokenizer.get("tokenizer_class") in (None, "TokenizersBackend"):
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer.setdefault("pad_token", tokenizer.get("eos_token"))
    tokenizer["padding_side"] = "left"  # right padding would separate a prompt from its continuation
    tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])  # decoders refuse token types
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if longest is not None:
        tokenizer["model_max_length"] = longest
    return tokenizer
