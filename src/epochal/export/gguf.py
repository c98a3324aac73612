"""A model folder as one GGUF file, the format of llama.cpp: Llama with a byte-level BPE, weights in float32, so exact.

Format: github.com/ggml-org/ggml, docs/gguf.md; names and keys come from the `gguf` package. llama.cpp rotates neighbouring
pairs of a head where transformers rotates its two halves, so the rows of q and k are put in another order.
"""

import json
from pathlib import Path
from typing import Any

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Kinds of tokens in GGUF: ordinary text, special, and rows of the embedding that no token has."""


def write_gguf(folder: Path, path: Path, *, name: str) -> None:
    """Write the model and tokenizer of a Hugging Face folder to `path`.

    Raises ValueError when the architecture is not Llama, its rotation is scaled, or the tokenizer is no byte-level BPE of
    GPT-2's kind, and ModuleNotFoundError without the package `gguf`.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check_architecture(config)
    tokenizer = _read_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_shape(writer, model.config, name)
    _add_tokenizer(writer, tokenizer, model.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for key, weight in model.named_parameters():  # a tied head is no parameter, and llama.cpp ties it too
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), _rows(key, weight, model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_architecture(config: dict[str, Any]) -> None:
    if config.get("architectures") != ["LlamaForCausalLM"] or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(
            f"architecture {config.get('architectures')} with biases or without is none that --gguf writes; "
            "export a LlamaForCausalLM without biases, or leave --gguf out."
        )
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r} is none that --gguf writes; leave --gguf out.")


def _read_tokenizer(folder: Path) -> dict[str, Any]:
    """Return tokenizer.json of a byte-level BPE whose text is split the way GPT-2 splits it."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json, which --gguf needs; leave --gguf out.")
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    split = table.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    if table["model"].get("type") != "BPE" or not plain or table.get("normalizer"):
        raise ValueError(
            f"{path} is no byte-level BPE of GPT-2's kind, the only one that --gguf writes; leave --gguf out."
        )
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
    tokens, kinds = _token_list(tokenizer, config.vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if isinstance(config.eos_token_id, int):
        writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)  # as the tokenizer in the folder does


def _token_list(tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind of every row of the embedding."""
    tokens = [f"[unused {index}]" for index in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else NORMAL
    return tokens, kinds


def _rows(key: str, weight: Any, config: Any) -> Any:
    """Return a weight as float32, the rows of q and k in the order of llama.cpp's rotation."""
    values = weight.detach().float().numpy()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return values
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
