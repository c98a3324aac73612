"""Build a decoder of transformers with random weights that depend on a seed alone.

The weights do not depend on the global random state, the device, the number of ranks or the order of parameters.

Shapes: a matrix is (out, in) as torch stores it, so fan_in is its second size, except in GPT-2, whose matrices are
(in, out); the embedding is (V, h).
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from epochal.models.config import INITIALISATIONS, ParameterCounts, check_initialisation, parameter_counts, read_config
from epochal.optim.roles import is_norm, is_transposed, parameter_roles

if TYPE_CHECKING:  # transformers takes seconds to import, so only the functions that need it do so
    from transformers import PretrainedConfig, PreTrainedModel

    from epochal.records import Workspace
    from epochal.run import Run

log = logging.getLogger(__name__)

__all__ = [
    "INITIALISATIONS",
    "ParameterCounts",
    "build_model",
    "draw_weights",
    "empty_model",
    "load_config",
    "next_token",
    "parameter_counts",
    "start_from",
    "weight_rule",
]

# One model at a time: `init_empty_weights` changes torch's modules for all threads, and two at once would leave them changed.
BUILDING = threading.Lock()


class WeightRule(NamedTuple):
    """Distribution of one parameter: N(0, `std`^2) truncated at +-`cut` x `std`; with a `std` of 0 all are `value`."""

    std: float
    cut: float = math.inf
    value: float = 1.0


def load_config(name_or_path: str | Path, *, vocab_size: int | None = None) -> PretrainedConfig:
    """Return a model file as a config of transformers with its ``initialisation``; arguments as in `read_config`."""
    return _as_config(read_config(name_or_path, vocab_size=vocab_size))


def _as_config(keys: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[keys["model_type"]].from_dict(dict(keys))


def build_model(
    name_or_path: str | Path | Mapping[str, Any],
    *,
    vocab_size: int,
    max_positions: int,
    seed: int,
    initialisation: str | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedModel:
    """Build a decoder on the CPU, float32; weights are a function of (file, vocab_size, initialisation, seed).

    * `name_or_path`: as for `read_config`.
    * `vocab_size`: of the run's tokenizer (padding included, if any).
    * `max_positions`: longest sequence in tokens; no weight depends on it.
    * `seed`: any integer.
    * `initialisation`: one of `INITIALISATIONS`, replaces that of the file.
    * `bos_token_id`, `eos_token_id`, `pad_token_id`: of the tokenizer, for `generate` and a saved folder.

    Raises ValueError for an invalid model file or a token id outside of the vocabulary.
    """
    keys = read_config(name_or_path, vocab_size=vocab_size, max_positions=max_positions)
    if initialisation is not None:
        check_initialisation(initialisation, where=f"Model '{name_or_path}'")
        keys["initialisation"] = initialisation
    for key, token in (("bos", bos_token_id), ("eos", eos_token_id), ("pad", pad_token_id)):
        if token is not None and not 0 <= token < vocab_size:
            raise ValueError(
                f"Model '{name_or_path}': {key}_token_id {token} is outside its vocabulary of {vocab_size}; "
                "use vocabulary and ids of the same tokenizer."
            )
        keys[f"{key}_token_id"] = token
    model = empty_model(_as_config(keys))
    draw_weights(model, seed=seed)
    return model


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of `config` with parameters on torch's meta device: shapes and names without memory."""
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # The class itself: AutoModelForCausalLM.from_config would shard it under ZeRO-3.
    # Constructors draw no weights that would be overwritten: half the time, same global random state. Buffers, such as
    # rotary frequencies, are not in a state dict and are made here.
    with BUILDING, torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    model.tie_weights()  # each parameter was replaced for itself
    return model


def draw_weights(model: PreTrainedModel, *, seed: int) -> None:
    """Allocate the weights of a model from `empty_model` on the CPU and draw them, in-place.

    The rule is ``model.config.initialisation``. Raises ValueError for a parameter that has none.
    """
    rules = weight_rules(model)
    drawn = {
        name: _draw(tuple(parameter.shape), rules[name], seed=seed, name=name)
        for name, parameter in model.named_parameters()
    }
    # Not strict: a tied head is in the state dict but not a separate parameter; it is tied again below.
    model.load_state_dict(drawn, strict=False, assign=True)
    model.tie_weights()
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def start_from(run: Run, model: PreTrainedModel, workspace: Workspace, tokenizer: Path) -> None:
    """Load the weights of `run.init_from`, if set, into a model of the same architecture, in-place.

    `tokenizer` is the folder of the run's tokenizer. Rows of the embedding and the head that belong to no token of it are left
    out. Raises ValueError if the folder of the weights is missing, has another architecture or another vocabulary, or is
    refused by `epochal.models.files.check_folder`.
    """
    if run.init_from is None:
        return
    from epochal.config import model_folder
    from epochal.data.tokenizer import vocabulary_difference
    from epochal.models.files import architecture_difference, check_folder, read_model_config

    folder = model_folder(run.init_from) if "/" in run.init_from else workspace.folder(run.init_from) / "model"
    if not folder.is_dir():
        raise ValueError(
            f"Run {run.name!r} starts from {run.init_from!r}, but {folder} has no model; run that job first."
        )
    check_folder(folder)
    stored, vocabulary = _stored(folder, model), model.config.vocab_size
    roles, unused = parameter_roles(model), 0
    for name, weight in model.named_parameters():
        stored_shape = tuple(stored[name].shape) if name in stored else None
        if stored_shape is not None and roles[name] in ("embedding", "head") and weight.shape[0] == vocabulary:
            # Models are padded to a round number of rows, which no token names.
            unused = max(unused, stored_shape[0] - vocabulary)
            stored[name], stored_shape = (
                stored[name][:vocabulary],
                (min(stored_shape[0], vocabulary), *stored_shape[1:]),
            )
        if stored_shape != tuple(weight.shape):
            raise ValueError(
                f"Run {run.name!r} ({run.model}) cannot start from {run.init_from!r}: {name} has shape {stored_shape} "
                f"instead of {tuple(weight.shape)}; start from a run of the same model."
            )
    # The same shapes may mean other heads, other rotary frequencies and other tokens.
    raw = read_model_config(folder)
    if raw.get("model_type") == model.config.model_type:  # with defaults, and as this version of transformers writes it
        raw = type(model.config).from_dict(raw).to_dict()
    difference = architecture_difference(model.config.to_dict(), raw)
    difference = difference or vocabulary_difference(folder, tokenizer)
    if difference is not None:
        raise ValueError(
            f"Run {run.name!r} ({run.model}) cannot start from {run.init_from!r}: {difference}; start from another."
        )
    if unused > 0:
        log.warning("%s: %d rows of the vocabulary of %s belong to no token and are left out", run.name, unused, folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(stored[name])


def _stored(folder: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights in a folder by the names of the model's parameters."""
    from safetensors.torch import load_file

    from epochal.models.files import weight_files

    # Large models are split into several files.
    stored = {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}
    # Older folders hold a decoder without the name of its part, and another name of GPT-NeoX's head.
    prefix = f"{model.base_model_prefix}."
    for name in dict(model.named_parameters()):
        for older in (name.removeprefix(prefix), name.replace("lm_head.", "embed_out.")):
            if name not in stored and older in stored:
                stored[name] = stored.pop(older)
    return stored


def next_token(
    model: Any, tokens: torch.Tensor, embeddings: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states (n, d) and targets (n,) for the predictions in (b, T) sequences.

    n = b (T - 1). `embeddings` (b, T, d) replace the embeddings of the tokens, if given.
    """
    inputs = {"input_ids": tokens} if embeddings is None else {"inputs_embeds": embeddings}
    # The decoder without the head: the loss forms logits in chunks (`epochal.loss`).
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()


# --- initialisation ---------------------------------------------------------------------------------------------------


def weight_rule(
    initialisation: str, role: str, *, fan_in: int, layers: int, initializer_range: float = 0.02
) -> WeightRule:
    """Return the distribution of a parameter.

    ================  ===========================================================================================
    initialisation    rule
    ================  ===========================================================================================
    infinite-compute  linear maps and head: 1/sqrt(fan_in), embedding: 1/h, all truncated at +-3 sigma and not
                      rescaled (so the standard deviation is 0.98658 of it); no depth scaling
                      (`docs/infinite_compute.md`, section 2). As published, also where the embedding variance
                      1/h^2 of a wide model is below the eps of the norm.
    normal            N(0, initializer_range) everywhere: the default of transformers and Fira
    gpt2              the same, but projections into the residual stream by 1/sqrt(2 L): GPT-2, and SPECTRA
                      (`docs/spectra.md`, section 2.2)
    ================  ===========================================================================================

    In all of them norm weights are 1 (those of a norm that multiplies by 1 + weight are 0), and biases 0.

    `role` is one of `epochal.optim.roles.parameter_roles` except ``"other"``; `fan_in` is the number of inputs of a linear
    map, and for an embedding its width h; `layers` is L, the number of blocks.
    """
    check_initialisation(initialisation)
    if role in ("norm", "bias"):
        return WeightRule(std=0.0, value=1.0 if role == "norm" else 0.0)
    if initialisation == "infinite-compute":
        return WeightRule(std=1 / fan_in if role == "embedding" else fan_in**-0.5, cut=3.0)
    if initialisation == "gpt2" and role == "residual":
        return WeightRule(std=initializer_range / math.sqrt(2 * layers))
    return WeightRule(std=initializer_range)


def weight_rules(model: PreTrainedModel) -> dict[str, WeightRule]:
    """Return the distribution of each parameter of a model by name; raises ValueError for one without a rule."""
    config, rules = model.config, {}
    for name, role in parameter_roles(model).items():
        if role == "other":
            raise ValueError(
                f"{type(model).__name__} cannot be trained: {name} is neither an embedding, a linear map, a norm nor a bias, so "
                "it has no initialisation; use another architecture."
            )
        owner, parameter = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        rule = weight_rule(
            config.initialisation,
            role,
            fan_in=parameter.shape[0 if is_transposed(owner) else -1],
            layers=config.num_hidden_layers,
            initializer_range=config.initializer_range,
        )
        rules[name] = rule._replace(value=0.0) if role == "norm" and adds_one(owner) else rule
    return rules


@torch.no_grad()
def adds_one(norm: torch.nn.Module) -> bool:
    """Whether a norm multiplies by 1 + weight instead of weight, as that of Gemma."""
    if not is_norm(norm) or isinstance(norm, torch.nn.LayerNorm | torch.nn.RMSNorm):
        return False
    # With a weight of 0 only such a norm lets something through.
    probe = copy.deepcopy(norm).to_empty(device="cpu")
    width = next(probe.parameters()).zero_().shape[-1]
    return bool(probe(torch.ones(1, width)).any())


def _draw(shape: tuple[int, ...], rule: WeightRule, *, seed: int, name: str) -> torch.Tensor:
    """Draw one parameter: float32 on the CPU, regardless of torch's default device and dtype."""
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    if rule.std == 0.0:
        return weight.fill_(rule.value)
    # A generator for each parameter, seeded by its name: adding a layer leaves the other layers unchanged.
    generator = torch.Generator(device="cpu").manual_seed(_parameter_seed(seed, name))
    weight.normal_(0.0, rule.std, generator=generator)
    # Rejection sampling rather than torch.nn.init.trunc_normal_, whose algorithm differs between torch versions.
    flat, limit = weight.view(-1), rule.cut * rule.std
    outside = (flat.abs() > limit).nonzero().squeeze(1)
    while len(outside):
        redrawn = torch.empty(len(outside), dtype=torch.float32, device="cpu")
        flat[outside] = redrawn.normal_(0.0, rule.std, generator=generator)
        outside = outside[redrawn.abs() > limit]
    return weight


def _parameter_seed(seed: int, name: str) -> int:
    # 32 bits: torch seeds its Mersenne twister with no more
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big")
