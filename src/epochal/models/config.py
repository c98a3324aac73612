"""Read, check and count model files without torch or transformers.

A model is one JSON file in transformers' format plus one key, ``initialisation``. Planning and cost estimates use
only this module, so it must import in milliseconds and without torch. Rotary embeddings use the key ``rope_theta``, the
one spelling that transformers 4.5x and 5.x both read.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from epochal.config import from_table, model_path, read_json
from epochal.ranges import OneOf, Range, Ranged

if TYPE_CHECKING:
    from epochal.run import Run

# Values of the key ``initialisation``; see `epochal.models.llama.weight_rule`.
INITIALISATIONS = ("infinite-compute", "normal", "gpt2")

DTYPES = ("float32", "bfloat16", "float16")

# Keys of the config.json of a model from elsewhere that change no weight and no loss.
LABELS = (*("_name_or_path", "task_specific_params", "gradient_checkpointing", "transformers.js_config"),)

# Dropout inside of transformers' models, by the key that turns it off.
NO_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout")

ROTARY_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

Size = Annotated[int, Range(1, 2**24)]
Token = Annotated[int, Range(0, 2**24)]
Layers = Annotated[int, Range(1, 10_000)]
Positive = Annotated[float, Range(1e-12, 1e12)]

ACTIVATIONS = ("silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh")


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
class PartialRotary(RotaryScaling):
    """Those of GPT-NeoX, which rotates a part of each head."""

    partial_rotary_factor: Annotated[float, Range(0.0, 1.0, above=True)] = 0.25


@dataclass(frozen=True, kw_only=True)
class RotaryByLayer(Ranged):
    """Those of Gemma-3, whose two kinds of layers have their own."""

    full_attention: RotaryScaling
    sliding_attention: RotaryScaling


# Dropout of transformers draws from the global random state, so that two equal Runs would differ; `Run.dropout` does not.
NoDropout = Annotated[float, Range(0.0, 0.0)]


@dataclass(frozen=True, kw_only=True)
class ModelFile(Ranged):
    """Keys that all model files share.

    Also those that transformers writes into the config.json of a saved model. Defaults of the classes below are those of
    transformers where a parameter or its use depends on them.
    """

    model_type: str
    initialisation: Annotated[str, OneOf(INITIALISATIONS)]
    vocab_size: Size
    initializer_range: Annotated[float, Range(1e-12, 1.0)] | None = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    architectures: tuple[str, ...] | None = None
    bos_token_id: Token | None = None
    eos_token_id: Token | None = None
    pad_token_id: Token | None = None
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    torch_dtype: Annotated[str, OneOf(DTYPES)] | None = None
    transformers_version: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rotated(ModelFile):
    """Keys of models with rotary embeddings."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    max_position_embeddings: Size | None = None
    attention_dropout: NoDropout = 0.0
    rope_theta: Positive | None = None
    rope_scaling: RotaryScaling | None = None
    hidden_act: Annotated[str, OneOf(ACTIVATIONS)] = "silu"


@dataclass(frozen=True, kw_only=True)
class Llama(Rotated):
    """Keys of a Llama."""

    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: Annotated[float, Range(0.0, 1.0)] = 1e-5
    rope_parameters: RotaryScaling | None = None
    pretraining_tp: Annotated[int, Range(1, 1)] = 1


@dataclass(frozen=True, kw_only=True)
class Mistral(Llama):
    """Keys of Mistral."""

    num_key_value_heads: Size | None = 8
    sliding_window: Size | None = 4096


@dataclass(frozen=True, kw_only=True)
class Qwen3(Llama):
    """Keys of Qwen3: queries and keys have a norm for each head."""

    num_key_value_heads: Size | None = 32
    head_dim: Size | None = 128
    sliding_window: Size | None = 4096
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Range(0, 10_000)] = 28
    layer_types: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Olmo2(Llama):
    """Keys of OLMo-2: norms follow the blocks, and one covers all heads of queries, one those of keys."""


@dataclass(frozen=True, kw_only=True)
class SmolLM3(Llama):
    """Keys of SmolLM3: some layers have no rotary embedding."""

    num_key_value_heads: Size | None = 4
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    sliding_window: Size | None = None
    max_window_layers: Annotated[int, Range(0, 10_000)] | None = None
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: Size = 4
    layer_types: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Gemma3(Llama):
    """Keys of Gemma-3: norms before and after the blocks, and of every head; most layers have a window."""

    num_key_value_heads: Size | None = 4
    head_dim: Size | None = 256
    tie_word_embeddings: bool = True
    hidden_activation: Annotated[str, OneOf(ACTIVATIONS)] = "gelu_pytorch_tanh"
    query_pre_attn_scalar: Positive = 256
    sliding_window: Size | None = 4096
    sliding_window_pattern: Size | None = None
    _sliding_window_pattern: Size | None = None
    layer_types: tuple[str, ...] | None = None
    rope_local_base_freq: Positive | None = None
    rope_parameters: RotaryByLayer | None = None  # type: ignore[assignment]
    cache_implementation: str | None = None
    use_bidirectional_attention: bool = False
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class GPTNeoX(Rotated):
    """Keys of GPT-NeoX (Pythia): LayerNorm, biases, attention and MLP side by side."""

    hidden_act: Annotated[str, OneOf(ACTIVATIONS)] = "gelu"
    hidden_dropout: NoDropout = 0.0
    layer_norm_eps: Annotated[float, Range(0.0, 1.0)] = 1e-5
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_pct: Annotated[float, Range(0.0, 1.0, above=True)] = 0.25
    rotary_emb_base: Positive | None = None
    rope_parameters: PartialRotary | None = None
    classifier_dropout: float = 0.1  # of another head
    is_decoder: bool = False


@dataclass(frozen=True, kw_only=True)
class GPT2(ModelFile):
    """Keys of GPT-2: LayerNorm, biases, a table of positions."""

    n_embd: Size
    n_layer: Layers
    n_head: Size
    n_positions: Size = 1024
    n_inner: Size | None = None
    tie_word_embeddings: bool = True
    activation_function: Annotated[str, OneOf(ACTIVATIONS)] = "gelu_new"
    layer_norm_epsilon: Annotated[float, Range(0.0, 1.0)] = 1e-5
    # transformers has 0.1 in all three, so they must be written.
    resid_pdrop: NoDropout
    embd_pdrop: NoDropout
    attn_pdrop: NoDropout
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    # Of another head.
    n_ctx: Size | None = None
    summary_type: str | None = None
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float = 0.1


FAMILIES: dict[str, type[ModelFile]] = {
    "llama": Llama,
    "mistral": Mistral,
    "qwen3": Qwen3,
    "olmo2": Olmo2,
    "smollm3": SmolLM3,
    "gemma3_text": Gemma3,
    "gpt_neox": GPTNeoX,
    "gpt2": GPT2,
}


class Shape(NamedTuple):
    """Sizes of a decoder: h, L, the heads and their width, f, and the learned positions (0: rotary)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    positions: int = 0


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Return the sizes of a model file; keys that it lacks have transformers' defaults."""
    family = FAMILIES[config.get("model_type", "llama")]
    if family is GPT2:
        h, heads = config["n_embd"], config["n_head"]
        positions = config.get("n_positions", GPT2.n_positions)
        return Shape(h, config["n_layer"], heads, heads, h // heads, config.get("n_inner") or 4 * h, positions)
    h, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", getattr(family, "num_key_value_heads", None)) or heads
    head_dim = config.get("head_dim", getattr(family, "head_dim", None)) or h // heads
    return Shape(h, config["num_hidden_layers"], heads, kv_heads, head_dim, config["intermediate_size"])


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
    * `max_positions`: longest sequence in tokens, replaces that of the file; a table of positions stays as it is.

    Raises ValueError for a missing or damaged file and for everything that `check_config` rejects.
    """
    if isinstance(name_or_path, Mapping):
        path, config = Path("(already read)"), dict(name_or_path)
    else:
        path = model_path(name_or_path)
        config = _read_json(path)
        if path.name == "config.json" and "initialisation" not in config:
            config = _from_elsewhere(config)
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    where = f"Model file '{path}'"
    check_config(config, where=where)
    positions = shape_of(config).positions
    if max_positions is not None and positions == 0:
        config["max_position_embeddings"] = max_positions
    elif max_positions is not None and max_positions > positions:
        raise ValueError(
            f"{where} has {positions} positions; use sequences of at most as many tokens, not {max_positions}."
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"Model file '{path}' {error}.") from None
    return config


def _from_elsewhere(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of a model from elsewhere as a model file.

    It has transformers' initialisation; its token ids are those of the tokenizer, and dropout is the Run's.
    """
    dropped = (*LABELS, *(key for key in config if key.endswith("_token_id")))
    off = {key: 0.0 for key in config if key in NO_DROPOUT or key == "attention_dropout"}
    kept = {key: value for key, value in config.items() if key not in dropped}
    return {**kept, **off, "initialisation": "normal"}


def check_config(config: Mapping[str, Any], *, where: str = "Model config") -> None:
    """Raise a ValueError unless `config` is a decoder that `build_model` can build.

    The message starts with `where`. Checked: architecture, keys, types and ranges, divisibility by the number of heads, and
    what is not supported, such as capped logits.
    """
    # Before its keys, which depend on it.
    OneOf(tuple(FAMILIES)).checker()(config.get("model_type", "llama"), f"{where}: model_type")
    checked = from_table(config, FAMILIES[config.get("model_type", "llama")], where=where)
    _check_heads(config, where)
    for key, reason in UNSUPPORTED.items():
        value = getattr(checked, key, None)
        if value and not isinstance(checked, GPTNeoX):  # whose biases are supported
            off = "false" if value is True else "null"
            raise ValueError(f"{where}: {key} is {json.dumps(value)}, but {reason} are not supported; set it to {off}.")


UNSUPPORTED = {
    "attention_bias": "biases",
    "mlp_bias": "biases",
    "use_bidirectional_attention": "tokens that see later ones",
    "add_cross_attention": "encoders",
    # The fused loss forms logits as a product of hidden states and head.
    "final_logit_softcapping": "capped logits",
    "attn_logit_softcapping": "capped attention scores",
}


def check_run(run: Run) -> None:
    """Raise a ValueError for a Run that its model does not allow, in one sentence."""
    _check_run(run.model, run.sequence_length, run.residual, type(run.optimizer).__name__, Path.cwd())


@functools.cache  # a campaign has many Runs of one model, whose name is looked up in the current folder first
def _check_run(model: str, sequence_length: int, residual: str, optimizer: str, folder: Path) -> None:
    config = read_config(model, max_positions=sequence_length)
    if residual == "bfloat16" and config["model_type"] != "llama":
        raise ValueError(
            f"Model {model!r} is a {config['model_type']}, whose layers widen a residual stream in bf16; set residual to "
            '"float32", or use a llama.'
        )
    if optimizer == "Fira" and config["model_type"] == "gpt2":
        raise ValueError(
            f"Model {model!r} is a gpt2, whose matrices are stored transposed, which Fira would project on the wrong side; use "
            "another optimizer."
        )


def check_initialisation(name: object, *, where: str = "Model config") -> None:
    """Raise a ValueError naming the choices unless `name` is one of `INITIALISATIONS`."""
    OneOf(INITIALISATIONS).checker()(name, f"{where}: initialisation")


def parameter_counts(config: Mapping[str, Any] | str | Path, *, vocab_size: int | None = None) -> ParameterCounts:
    """Count the parameters of a model with a closed formula.

    With V the vocabulary, h the width, L the layers, q = heads x head_dim, k = kv heads x head_dim and f the inner size
    of the MLP, the matrices of a Llama outside the vocabulary are L(2hq + 2hk + 3hf) and the norms (2L + 1)h. The embedding
    and the head are V h each, or V h together when they are tied (`docs/infinite_compute.md`, section 2). Other
    architectures have more norms, or biases and two matrices in the MLP; a table of positions counts as an embedding.

    `config` is a mapping with the keys of a model file, or a name or path for `read_config`; `vocab_size` replaces V.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    V = config["vocab_size"] if vocab_size is None else vocab_size
    family, shape = FAMILIES[config.get("model_type", "llama")], shape_of(config)
    h, f, q, k = shape.width, shape.inner, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = 2 * h * q + 2 * h * k
    if family in (GPT2, GPTNeoX):
        attention_biases = 4 * h if config.get("attention_bias", True) else 0
        # Two LayerNorms with biases, as the last one.
        layer, last = matrices + attention_biases + 2 * h * f + f + h + 4 * h, 2 * h
    else:
        norms = {Qwen3: 2 * h + 2 * shape.head_dim, Olmo2: 2 * h + q + k, Gemma3: 4 * h + 2 * shape.head_dim}
        layer, last = matrices + 3 * h * f + norms.get(family, 2 * h), h
    non_embedding = shape.layers * layer + last
    tied = config.get("tie_word_embeddings", family.tie_word_embeddings)
    vocabulary = V * h * (1 if tied else 2) + shape.positions * h
    return ParameterCounts(total=non_embedding + vocabulary, non_embedding=non_embedding)


def flops_per_token(
    config: Mapping[str, Any] | str | Path, sequence_length: int, *, vocab_size: int | None = None
) -> int:
    """Return the FLOPs of training on one token of a sequence of T tokens.

    6 for each parameter that multiplies: the embedding is a lookup and counts only where it is the head too. 12 L q T for
    attention, as if it were not causal and had no window (the convention of PaLM, appendix B, and of nanochat). The one
    formula of MFU.
    """
    if isinstance(config, str | Path):
        config = read_config(config)
    V = config["vocab_size"] if vocab_size is None else vocab_size
    shape = shape_of(config)
    counts = parameter_counts(config, vocab_size=vocab_size)
    multiplied = counts.non_embedding + V * shape.width
    flops: int = 6 * multiplied + 12 * shape.layers * shape.heads * shape.head_dim * sequence_length
    return flops


def head_parameters(config: Mapping[str, Any] | str | Path, *, vocab_size: int | None = None) -> int:
    """Return the parameters that one more head multiplies: a linear map of the width and the head of the model."""
    if isinstance(config, str | Path):
        config = read_config(config)
    width = shape_of(config).width
    return width * (width + (config["vocab_size"] if vocab_size is None else vocab_size))


def _check_heads(config: Mapping[str, Any], where: str) -> None:
    width, _, heads, kv_heads, head_dim, *_ = shape_of(config)
    learned = config.get("model_type") == "gpt2"
    names = ("n_embd", "n_head") if learned else ("hidden_size", "num_attention_heads")
    if width % heads:
        raise ValueError(
            f"{where}: {names[0]} {width} is not a multiple of {names[1]} {heads}; "
            f"use {_nearest_divisor(width, heads)} heads or another width."
        )
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
            f"use {_nearest_divisor(heads, kv_heads)} key-value heads."
        )
    if head_dim % 2 and not learned:
        raise ValueError(
            f"{where}: the head dimension must be even for rotary embeddings, got {head_dim}; "
            "change hidden_size or num_attention_heads."
        )


def _nearest_divisor(whole: int, wanted: int) -> int:
    """Return the divisor of `whole` nearest to `wanted`, the smaller of two."""
    small = [d for d in range(1, math.isqrt(whole) + 1) if whole % d == 0]
    divisors = [*small, *(whole // d for d in small)]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
