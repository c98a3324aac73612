"""Read, check and count model files without torch or transformers.

A model is one JSON file in transformers' Llama format plus one key, ``initialisation``. Planning and cost estimates use
only this module, so it must import in milliseconds and without torch. Rotary embeddings use the key ``rope_theta``, the
one spelling that transformers 4.5x and 5.x both read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from epochal.config import from_table, model_path, read_json
from epochal.ranges import OneOf, Range, Ranged

# Values of the key ``initialisation``; see `epochal.models.llama.weight_rule`.
INITIALISATIONS = ("infinite-compute", "normal", "gpt2")

DTYPES = ("float32", "bfloat16", "float16")

ROTARY_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

Size = Annotated[int, Range(1, 2**24)]
Token = Annotated[int, Range(0, 2**24)]
Positive = Annotated[float, Range(1e-12, 1e12)]


@dataclass(frozen=True, kw_only=True)
class RotaryScaling(Ranged):
    """Keys of ``rope_parameters`` and ``rope_scaling``."""

    rope_type: Annotated[str, OneOf(("default", "linear", "dynamic", "llama3"))] = "default"
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ROTARY_NEEDS.get(self.rope_type, ()):
            if getattr(self, key) is None:
                raise ValueError(f"rope_type {self.rope_type!r} needs {key}; add it.")


@dataclass(frozen=True, kw_only=True)
class ModelFile(Ranged):
    """Keys of a model file: those of a Llama, and what transformers writes into the config.json of a saved model."""

    model_type: Annotated[str, OneOf(("llama",))]
    initialisation: Annotated[str, OneOf(INITIALISATIONS)]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Range(1, 10_000)]
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    # Dropout inside of attention draws from the global random state, so that two equal Runs would differ.
    attention_dropout: Annotated[float, Range(0.0, 0.0)] = 0.0
    initializer_range: Annotated[float, Range(1e-12, 1.0)] | None = 0.02
    rms_norm_eps: Annotated[float, Range(0.0, 1.0)] = 1e-5
    rope_theta: Positive | None = None
    rope_parameters: RotaryScaling | None = None
    rope_scaling: RotaryScaling | None = None
    hidden_act: Annotated[str, OneOf(("silu", "gelu", "relu"))] = "silu"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    architectures: tuple[str, ...] | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | None = None
    pad_token_id: Token | None = None
    pretraining_tp: Annotated[int, Range(1, 1)] = 1
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    torch_dtype: Annotated[str, OneOf(DTYPES)] | None = None
    transformers_version: str | None = None


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
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"Model file '{path}' {error}.") from None
    return config


def check_config(config: Mapping[str, Any], *, where: str = "Model config") -> None:
    """Raise a ValueError unless `config` is a Llama that `build_model` can build.

    The message starts with `where`. Checked: keys, types and ranges, divisibility by the number of heads, no biases.
    """
    checked = from_table(config, ModelFile, where=where)
    _check_heads(config, where)
    for key in ("attention_bias", "mlp_bias"):
        if getattr(checked, key):
            raise ValueError(f"{where}: {key} is true, but biases are not supported; set it to false.")


def check_initialisation(name: object, *, where: str = "Model config") -> None:
    """Raise a ValueError naming the choices unless `name` is one of `INITIALISATIONS`."""
    OneOf(INITIALISATIONS).checker()(name, f"{where}: initialisation")


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


def flops_per_token(
    config: Mapping[str, Any] | str | Path, sequence_length: int, *, vocab_size: int | None = None
) -> int:
    """Return the FLOPs of training on one token of a sequence of T tokens.

    6 for each parameter that multiplies: the embedding is a lookup and counts only where it is the head too. 12 L q T for
    attention, as if it were not causal (the convention of PaLM, appendix B, and of nanochat). The one formula of MFU.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    V = config["vocab_size"] if vocab_size is None else vocab_size
    heads, _, head_dim = head_shape(config)
    counts = parameter_counts(config, vocab_size=vocab_size)
    multiplied = counts.non_embedding + V * config["hidden_size"]
    flops: int = 6 * multiplied + 12 * config["num_hidden_layers"] * heads * head_dim * sequence_length
    return flops


def head_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (heads, kv heads, head_dim); the last two have transformers' defaults."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads") or heads
    head_dim: int = config.get("head_dim") or config["hidden_size"] // heads
    return heads, kv_heads, head_dim


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
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    divisors = [*small, *(whole // d for d in small)]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
