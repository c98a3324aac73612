"""Read, check and count model files without torch or transformers.

A model is one JSON file in transformers' Llama format plus one key, ``initialisation``. Planning and cost estimates use
only this module, so it must import in milliseconds and without torch. Rotary embeddings use the key ``rope_theta``, the
one spelling that transformers 4.5x and 5.x both read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from epochal.config import model_path, nearest

# Values of the key ``initialisation``; see `epochal.models.llama.weight_rule`.
INITIALISATIONS = ("infinite-compute", "normal", "gpt2")

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_REQUIRED = (*_SIZES, "model_type", "initialisation")
_BIASES = ("attention_bias", "mlp_bias")
# Written by transformers: the config.json of a saved model must be readable as a model file.
_FROM_TRANSFORMERS = (
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "hidden_act", "initializer_range",
    "pad_token_id", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
)  # fmt: skip
KEYS = frozenset((*_REQUIRED, *_OPTIONAL_SIZES, *_BIASES, *_FROM_TRANSFORMERS))


class ParameterCounts(NamedTuple):
    """Number of parameters in total, and without the input embedding and the output head."""

    total: int
    non_embedding: int


def read_config(
    name_or_path: str | Path | Mapping[str, Any], *, vocab_size: int | None = None, max_positions: int | None = None
) -> dict[str, Any]:
    """Read and check one model file.

    * `name_or_path`: a name in ``configs/models``, a JSON file, a folder with a ``config.json``, or its content.
    * `vocab_size`: replaces that of the file.
    * `max_positions`: longest sequence in tokens, replaces that of the file; no parameter depends on it.

    Raises ValueError for a missing or damaged file and for everything that `check_config` rejects.
    """
    if isinstance(name_or_path, Mapping):
        path, config = Path("(already read)"), dict(name_or_path)
    else:
        path = model_path(name_or_path)
        config = _read_json(path)
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if max_positions is not None:
        config["max_position_embeddings"] = max_positions
    check_config(config, where=f"Model file '{path}'")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Model file '{path}' is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"Model file '{path}' must hold a JSON object, got a {type(config).__name__}.")
    return config


def check_config(config: Mapping[str, Any], *, where: str = "Model config") -> None:
    """Raise a ValueError unless `config` is a Llama that `build_model` can build.

    The message starts with `where`. Checked: known and required keys, sizes, divisibility by the number of heads,
    initialisation, no biases.
    """
    _check_keys(config, where)
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(key)
        optional = key in _OPTIONAL_SIZES and value is None
        # bool is a subclass of int
        if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{where}: {key} must be a positive integer, got {value!r}.")
    _check_heads(config, where)
    if config["model_type"] != "llama":
        raise ValueError(f"{where}: model_type must be 'llama', got {config['model_type']!r}.")
    for key in _BIASES:
        if config.get(key):
            raise ValueError(f"{where}: {key} is true, but biases are not supported; set it to false.")
    deviation = config.get("initializer_range", 0.02)
    if isinstance(deviation, bool) or not isinstance(deviation, int | float) or not 0 < deviation <= 1:
        raise ValueError(f"{where}: initializer_range must be in (0, 1], got {deviation!r}; 0.02 is usual.")
    check_initialisation(config["initialisation"], where=where)


def check_initialisation(name: object, *, where: str = "Model config") -> None:
    """Raise a ValueError naming the nearest choice unless `name` is one of `INITIALISATIONS`."""
    if name not in INITIALISATIONS:
        known = ", ".join(INITIALISATIONS)
        raise ValueError(
            f"{where}: initialisation {name!r} is unknown{nearest(str(name), INITIALISATIONS)}; use one of {known}."
        )


def parameter_counts(config: Mapping[str, Any] | str | Path, *, vocab_size: int | None = None) -> ParameterCounts:
    """Count the parameters of a model with a closed formula.

    With V the vocabulary, h the width, L the layers, q = heads x head_dim, k = kv heads x head_dim and f the inner size
    of the MLP, the matrices outside the vocabulary are L(2hq + 2hk + 3hf) and the norms (2L + 1)h. The embedding and
    the head are V h each, or V h together when they are tied (`docs/infinite_compute.md`, section 2).

    `config` is a mapping with the keys of a model file, or a name or path for `read_config`; `vocab_size` replaces V.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    V = config["vocab_size"] if vocab_size is None else vocab_size
    h, L, f = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads, kv_heads, head_dim = head_shape(config)
    layer = 2 * h * heads * head_dim + 2 * h * kv_heads * head_dim + 3 * h * f + 2 * h
    non_embedding = L * layer + h
    vocabulary = V * h * (1 if config.get("tie_word_embeddings", False) else 2)
    return ParameterCounts(total=non_embedding + vocabulary, non_embedding=non_embedding)


def head_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (heads, kv heads, head_dim); the last two have transformers' defaults."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads") or heads
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    return heads, kv_heads, head_dim


def _check_keys(config: Mapping[str, Any], where: str) -> None:
    for key in config:
        if key not in KEYS:
            raise ValueError(f"{where}: key '{key}' is unknown{nearest(key, KEYS)}; remove or correct it.")
    for key in _REQUIRED:
        if key not in config:
            raise ValueError(f"{where}: key '{key}' is missing; add it.")


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    heads, kv_heads, head_dim = head_shape(config)
    width = config["hidden_size"]
    if width % heads:
        raise ValueError(
            f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}; "
            f"use {_nearest_divisor(width, heads)} heads or another width."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
            f"use {_nearest_divisor(heads, kv_heads)} key-value heads."
        )
    if head_dim % 2:
        raise ValueError(
            f"{where}: the head dimension must be even for rotary embeddings, got {head_dim}; "
            "change hidden_size or num_attention_heads."
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    """Return the divisor of `whole` nearest to `wanted`, the smaller of two."""
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
