"""An ensemble as a transformers causal language model: load, save, generate, score.

b texts, t new tokens, V vocabulary, K members. Each member has its own KV cache. Plain sampling from the mean of
probabilities runs one member per token; everything else (greedy, beams, top-k, scores, averaged logits) runs all members.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from epochal.run import AVERAGES

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*")


class EnsembleConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of an ensemble: the member models and how their predictions are averaged."""

    model_type = "epochal_ensemble"

    members: list[str] | tuple[str, ...] = ()  # folders inside the ensemble's; in memory also other paths and hub names
    average: str = ""  # "logits" or "probs"
    weights: list[float] | tuple[float, ...] | None = None  # summing to one (None: equal)
    temperature: float = 1.0  # divides every member's logits before averaging
    vocab_size: int = 0  # this and all that follow are taken from the members
    max_position_embeddings: int = 0
    num_hidden_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class EnsembleCache(Cache):  # type: ignore[misc]
    """All tokens so far, (b, length), their positions, and the KV cache of each member.

    The cache of a member may cover fewer tokens. With `one_member`, a forward pass samples one member for each text
    instead of averaging all.
    """

    def __init__(self, configs: Sequence[Any]) -> None:
        # transformers calls the methods below on any cache; the layers are those of the members.
        super().__init__(layers=[])
        self.members = [DynamicCache(config=config) for config in configs]
        self.tokens: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.one_member = False

    def append(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and their positions, (b, t), and return all of them, (b, length)."""
        if self.tokens is not None and self.positions is not None:
            tokens, positions = torch.cat([self.tokens, tokens], 1), torch.cat([self.positions, positions], 1)
        self.tokens, self.positions = tokens, positions
        return tokens, positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far, including those that some members have not processed."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of texts; -1 before the first forward pass."""
        return -1 if self.tokens is None else self.tokens.shape[0]

    @property
    def is_initialized(self) -> bool:
        """Whether there was a forward pass."""
        return self.tokens is not None

    @property
    def is_croppable(self) -> bool:
        """Whether the last tokens of every member can be removed."""
        return all(member.is_croppable for member in self.members)

    def reset(self) -> None:
        """Remove all tokens."""
        self.tokens = self.positions = None
        for member in self.members:
            member.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens."""
        length = self.get_seq_length() - abs(tokens_to_remove)
        for member in self.members:  # a member that is behind has fewer tokens to remove, or none
            member.crop(min(0, length - member.get_seq_length()))
        if self.tokens is not None and self.positions is not None:
            self.tokens, self.positions = self.tokens[:, :length], self.positions[:, :length]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace text i by text `beam_idx[i]`."""
        self._select(beam_idx)
        for member in self.members:
            member.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the texts `indices`."""
        self._select(indices)
        for member in self.members:
            member.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every text `repeats` times."""
        # batch_size is -1 before the first forward pass.
        self._select(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))
        for member in self.members:
            member.batch_repeat_interleave(repeats)

    def _select(self, indices: torch.Tensor) -> None:
        if self.tokens is not None and self.positions is not None:
            rows = indices.to(self.tokens.device)
            self.tokens, self.positions = self.tokens[rows], self.positions[rows]


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """K causal language models with one vocabulary; logits are the mean logits or the log of the mean probabilities.

    Members may differ in size and architecture. They stay in memory if together they fit into `memory_limit` bytes (by
    default the free memory); otherwise each is loaded for its forward pass and dropped.
    """

    config_class = EnsembleConfig
    main_input_name = "input_ids"
    _no_split_modules: tuple[str, ...] = ()
    _supports_sdpa = True

    def __init__(
        self,
        config: EnsembleConfig,
        *,
        folder: Path | None = None,
        memory_limit: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        paths = [_resolve(member, folder) for member in config.members]
        _check(config, paths)
        configs = [AutoConfig.from_pretrained(path, trust_remote_code=False) for path in paths]
        _fill(config, paths, configs)
        super().__init__(config)
        self.paths, self.member_configs, self._load_dtype = paths, configs, dtype
        shares = config.weights or [1.0 / len(paths)] * len(paths)
        # A buffer, so that it moves with the model; not persistent, because the config has it.
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float64), persistent=False)
        # By size on disk, before anything is loaded.
        self.resident = sum(map(_bytes, paths)) <= (_free_bytes() if memory_limit is None else memory_limit)
        self.members = torch.nn.ModuleList([self._load(path) for path in paths] if self.resident else [])
        self.generation_config = GenerationConfig.from_model_config(config)
        self.eval()

    @classmethod
    def from_members(
        cls,
        paths: Sequence[str | Path],
        *,
        average: str,
        weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        memory_limit: int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> "EnsembleForCausalLM":
        """Load the models at `paths` (folders or hub names) as one; options as in `EnsembleConfig`.

        Raises ValueError if members differ in vocabulary or tokenizer, or an option is invalid.
        """
        shares = None if weights is None else list(weights)
        names = [str(path) for path in paths]
        config = EnsembleConfig(members=names, average=average, weights=shares, temperature=temperature)
        return cls(config, memory_limit=memory_limit, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: EnsembleConfig | None = None,
        memory_limit: int | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        revision: str | None = None,
        **__: Any,
    ) -> "EnsembleForCausalLM":
        """Load a folder written by `save_pretrained`, or a hub repository with such files; other options are ignored.

        Raises ValueError for `device_map` and `quantization_config`, or if members do not fit together.
        """
        if device_map is not None or quantization_config is not None:
            raise ValueError(
                "device_map and quantization_config are not supported for ensembles; load the model, then use .to(device)."
            )
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path), revision=revision))
        config = config or EnsembleConfig.from_pretrained(folder)
        model = cls(config, folder=folder, memory_limit=memory_limit, dtype=dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a self-contained folder: members, tokenizer and config. `kwargs` are passed on for each member."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"member-{k:02d}" for k in range(len(self.paths))]
        for k, (name, path) in enumerate(zip(names, self.paths, strict=True)):
            self._member(k).save_pretrained(folder / name, **kwargs)
            copy_tokenizer(path, folder / name)
        copy_tokenizer(self.paths[0], folder)
        config = EnsembleConfig.from_dict({**self.config.to_dict(), "members": names})
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EnsembleCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits (b, t, V) float32 of t new tokens.

        With `logits_to_keep` above 0 only those of the last tokens are returned.
        `attention_mask` is (b, length so far), 0 for padding on the left; `labels` (b, t) add the next-token loss. Raises
        ValueError without `input_ids`.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "pass input_ids; inputs_embeds are not supported because members have different embeddings."
            )
        # Without a cache every member processes all tokens.
        cache = past_key_values if past_key_values is not None or not use_cache else self._new_cache()
        seen = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, seen)
        tokens, positions = input_ids, position_ids.expand_as(input_ids)
        if cache is not None:
            tokens, positions = cache.append(tokens, positions)
        keep = logits_to_keep or input_ids.shape[1]

        def logits_of(k: int) -> torch.Tensor:
            member_cache = None if cache is None else cache.members[k]
            # Lazy prefill: a member processes all tokens since its last turn in one forward pass, about K of them.
            # That costs little more than one token while decoding is bound by reading weights.
            start = 0 if member_cache is None else member_cache.get_seq_length()  # where this member's prefill begins
            output = self._member(k)(
                input_ids=tokens[:, start:],
                attention_mask=attention_mask,
                position_ids=positions[:, start:],
                past_key_values=member_cache,
                use_cache=cache is not None,
                logits_to_keep=keep,
            )
            logits: torch.Tensor = output.logits.float() / self.config.temperature
            return logits

        one = cache is not None and cache.one_member and labels is None
        logits = self._sampled_member(logits_of, len(input_ids)) if one else self._mean(logits_of)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _mean(self, logits_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Return the mean logits, or the log of the mean probabilities, (b, t, V)."""
        total: torch.Tensor | None = None
        for k, share in enumerate(self.shares.tolist()):
            # A member without weight need not run, and its log would be -inf.
            if share == 0.0:
                continue
            logits = logits_of(k)
            if self.config.average == "logits":
                total = logits * share if total is None else total.add_(logits, alpha=share)
            else:
                part = logits.log_softmax(-1) + math.log(share)
                total = part if total is None else torch.logaddexp(total, part)
        assert total is not None
        return total

    def _sampled_member(self, logits_of: Callable[[int], torch.Tensor], texts: int) -> torch.Tensor:
        """Return the log-probabilities (b, t, V) of one member for each text, drawn by weight."""
        # Drawing a member by weight, then a token from it, has exactly the distribution of the mean of probabilities.
        drawn = torch.multinomial(self.shares, texts, replacement=True)
        rows: torch.Tensor | None = None
        # Only the drawn members run; each runs on all texts, and its rows are kept where it was drawn.
        for k in sorted(set(drawn.tolist())):
            part = logits_of(k).log_softmax(-1)
            rows = part if rows is None else torch.where((drawn == k)[:, None, None], part, rows)
        assert rows is not None
        return rows

    # --- members -------------------------------------------------------------------------------------------------------

    def _load(self, path: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=self._load_dtype or "auto", trust_remote_code=False, use_safetensors=True
        )
        return model.eval().requires_grad_(False)

    def _member(self, k: int) -> Any:
        return self.members[k] if self.resident else self._load(self.paths[k]).to(self.device)

    @property
    def device(self) -> torch.device:
        """Device of the members."""
        device: torch.device = self.shares.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first member's weights; float32 if members are loaded one at a time."""
        weights = next(self.members.parameters(), None)
        return torch.float32 if weights is None else weights.dtype

    def get_input_embeddings(self) -> Any:
        """Return None: each member has its own."""
        return None

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Do nothing: members tie their own weights when they are loaded."""

    # --- generation: overrides of transformers' GenerationMixin --------------------------------------------------------

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, but `top_k` is 0 by default when sampling, not 50."""
        # transformers defaults to top_k = 50, which would not be a sample from the model.
        if kwargs.get("do_sample") and generation_config is None:
            kwargs.setdefault("top_k", 0)
        return super().generate(inputs, generation_config, **kwargs)

    def _new_cache(self) -> EnsembleCache:
        return EnsembleCache(self.member_configs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} is not supported for ensembles; leave it out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_cache()

    def _sample(
        self, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **model_kwargs: Any
    ) -> Any:
        """As in GenerationMixin; one member per token if that has the distribution asked for."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, EnsembleCache):
            cache.one_member = (
                self.config.average == "probs"
                and bool(generation_config.do_sample)
                and not len(logits_processor)  # temperature, top-k, penalties change the distribution
                and not generation_config.output_scores
                and not generation_config.output_logits
            )
        try:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        finally:
            if isinstance(cache, EnsembleCache):
                cache.one_member = False


def _positions(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, seen: int) -> torch.Tensor:
    """Return the positions (b or 1, t) of new tokens, not counting padding."""
    length = input_ids.shape[1]
    if attention_mask is None:
        return torch.arange(seen, seen + length, device=input_ids.device)[None]
    # Padding is on the left, so the first real token of every text has position 0.
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _resolve(member: str, folder: Path | None) -> str:
    """Return the path of a member, inside the ensemble's folder if it has one.

    Raises ValueError for a path outside: a downloaded folder must not choose what else is read.
    """
    if folder is None:
        return member
    if Path(member).is_absolute() or ".." in Path(member).parts or not (folder / member).is_dir():
        raise ValueError(f"{folder}: member {member!r} is not a folder inside it; export the ensemble again.")
    return str(folder / member)


def _check(config: EnsembleConfig, paths: list[str]) -> None:
    if config.average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {config.average!r}.")
    if not paths:
        raise ValueError("members is empty; give at least one model folder.")
    if not config.temperature > 0:
        raise ValueError(f"temperature must be positive, got {config.temperature}.")
    weights = config.weights
    if weights is not None and (len(weights) != len(paths) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
        raise ValueError(
            f"weights must be {len(paths)} non-negative numbers that sum to 1, one per member, got {weights}."
        )


def _fill(config: EnsembleConfig, paths: list[str], configs: list[Any]) -> None:
    """Copy shared settings of the members into the config; raises ValueError if members differ in them."""
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        values = [getattr(member, key, None) for member in configs]
        if any(value != values[0] for value in values):
            raise ValueError(f"members have {key} {values}; all members must have the same.")
        setattr(config, key, values[0])
    vocabularies = {path: _token_ids(Path(path)) for path in paths}
    compared = [path for path in paths if vocabularies[path]]
    for path in compared[1:]:
        differing = vocabularies[compared[0]].items() ^ vocabularies[path].items()
        if differing:
            raise ValueError(
                f"the tokenizers of {compared[0]} and {path} give {min(token for token, _ in differing)!r} different ids; "
                "all members must have the same vocabulary."
            )
    config.max_position_embeddings = min(member.max_position_embeddings for member in configs)
    config.num_hidden_layers = max(member.num_hidden_layers for member in configs)


def _token_ids(folder: Path) -> dict[str, int]:
    """Return the map from token to id of a model folder; empty for a hub name or a folder without a tokenizer."""
    path = folder / "tokenizer.json"
    if path.is_file():
        table = json.loads(path.read_text(encoding="utf-8"))
        tokens = table["model"]["vocab"]
        if isinstance(tokens, list):  # pairs of a token and its score
            tokens = {token: index for index, (token, _) in enumerate(tokens)}
    elif (folder / "vocab.json").is_file():
        table, tokens = {}, json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    else:
        return {}
    return {**tokens, **{added["content"]: added["id"] for added in table.get("added_tokens", ())}}


def _bytes(path: str) -> int:
    """Return the size of a member's weights on disk; 0 for a hub name that is not downloaded."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy the tokenizer files of one model folder into another; does nothing if `source` is a hub name."""
    for pattern in TOKENIZER_FILES:
        for file in Path(source).glob(pattern):
            shutil.copy(file, folder / file.name)


AutoConfig.register(EnsembleConfig.model_type, EnsembleConfig)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM)
