"""Convert a model folder to GGUF, the format of llama.cpp: Llama, Mistral or Qwen3 with byte-level BPE, in float32.

Format: github.com/ggml-org/ggml, docs/gguf.md; names and keys come from the `gguf` package.
"""

import json
from pathlib import Path
from typing import Any

# Names of the format for architectures that it shares with transformers. llama.cpp reads Mistral as a Llama, without windows.
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}

# Token types of GGUF: text, special, and unused rows of the embedding.
NORMAL, CONTROL, UNUSED = 1, 3, 5


def write_gguf(folder: Path, path: Path, *, name: str) -> None:
    """Write the model and tokenizer of a Hugging Face folder to `path`.

    Raises ValueError if the architecture is not one of `ARCHITECTURES`, has biases or windows, its rotary embedding is
    scaled, or the tokenizer is not GPT-2's byte-level BPE; ModuleNotFoundError without the package `gguf`.
    """
    import gguf

    from epochal.models.files import open_model

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = _check_architecture(config)
    tokenizer = _read_tokenizer(folder)
    model = open_model(folder)
    writer = gguf.GGUFWriter(str(path), architecture)
    _add_shape(writer, model.config, name)
    _add_tokenizer(writer, tokenizer, model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    for key, weight in model.named_parameters():  # without a tied head, which llama.cpp ties too
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), _rows(key, weight, model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_architecture(config: dict[str, Any]) -> str:
    """Return the format's name of a model's architecture; raises ValueError for one that it does not support."""
    name = next(iter(config.get("architectures") or ["no architecture"]))
    if name not in ARCHITECTURES:
        raise ValueError(f"--gguf supports only {', '.join(ARCHITECTURES)}, got {name}; leave --gguf out.")
    for key in ("attention_bias", "mlp_bias", "sliding_window"):
        if config.get(key):
            raise ValueError(f"--gguf does not support {key} = {config[key]}; leave --gguf out.")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"--gguf does not support rope_type {rope['rope_type']!r}; leave --gguf out.")
    return ARCHITECTURES[name]


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which --gguf needs; leave --gguf out.")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    split = table.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    if table["model"].get("type") != "BPE" or not plain or table.get("normalizer"):
        raise ValueError(f"--gguf supports only GPT-2's byte-level BPE, unlike {path}; leave --gguf out.")
    return table


def _add_shape(writer: Any, config: Any, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)  # all float32


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: Any) -> None:
    tokens, types = _token_list(tokenizer, config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)  # as for the tokenizer in the folder


def _token_list(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of every row of the embedding."""
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else NORMAL
    return tokens, types


def _rows(key: str, weight: Any, config: Any) -> Any:
    # llama.cpp rotates neighboring pairs of a head, transformers its two halves: reorder the rows of q and k.
    values = weight.detach().float().numpy()
    # Qwen3 is rotated as in transformers.
    if config.model_type == "qwen3":
        return values
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return values
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
