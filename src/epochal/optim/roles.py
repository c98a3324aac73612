"""The role of each parameter of a decoder, found from its modules instead of names.

A decoder is a transformers model for causal language modelling: an embedding, layers in one `nn.ModuleList`, a last norm and
a head. Everything but the layers and the head is also found in other modules, such as those of a test.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a linear map whose weight is (inputs, outputs), as in GPT-2."""
    # All base classes, because FSDP2 replaces the class of a module by one derived from it.
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm; those of transformers share no base class."""
    return any("norm" in base.__name__.lower() for base in type(module).__mro__)


def decoder_layers(model: Any) -> Sequence[nn.Module]:
    """Return the layers of a decoder: the modules of its first `nn.ModuleList`; empty without one."""
    return next((list(module) for module in model.modules() if isinstance(module, nn.ModuleList)), ())


def last_norm(model: Any) -> nn.Module:
    """Return the norm between the last layer and the head."""
    norm: nn.Module = [module for module in model.base_model.children() if is_norm(module)][-1]
    return norm


def residual_outputs(model: nn.Module) -> list[nn.Module]:
    """Return the linear maps whose outputs are added to the residual stream.

    They are the last of each block of a layer: attention, MLP.
    """
    outputs = []
    for layer in decoder_layers(model):
        for block in layer.children():
            linears = [module for module in block.modules() if is_linear(module)]
            outputs += linears[-1:]
    return outputs


def head_of(model: Any) -> nn.Module | None:
    """Return the output head of a decoder, None for another module."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def head_weight(model: Any) -> Tensor:
    """Return the weight (V, d) of a decoder's head."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Return the role of each parameter by name.

    ``"embedding"`` of tokens or positions (also a head that is tied to it), ``"head"``, ``"residual"`` (see
    `residual_outputs`), ``"linear"``, ``"norm"``, ``"bias"``, or ``"other"``, for example experts in one tensor.
    """
    head, outputs = head_of(model), {id(module) for module in residual_outputs(model)}
    roles = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            roles[f"{prefix}.{name}" if prefix else name] = _role(module, name, head, outputs)
    # Parameters in two modules count where they come first, as in `named_parameters`: a tied head is the embedding.
    return {name: roles[name] for name, _ in model.named_parameters()}


def _role(module: nn.Module, name: str, head: nn.Module | None, outputs: set[int]) -> str:
    if name == "bias":
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if module is head:
        return "head"
    if is_linear(module):
        return "residual" if id(module) in outputs else "linear"
    return "norm" if is_norm(module) else "other"
