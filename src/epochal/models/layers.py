"""Change how a decoder's layers are computed, in place: attention, compilation, recomputation, fused products.

None of it changes a parameter, its name or the saved folder; what changes rounding says so. A decoder is any
transformers model for causal language modelling (`epochal.optim.roles`).
"""

import gc
import importlib.util
import os
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from epochal.optim.roles import decoder_layers, last_norm

# The backend of torch.compile.
COMPILER = "inductor"

# Graphs that one process keeps: a worker trains models of many shapes. Beyond it torch.compile would raise.
MOST_GRAPHS = 256


def apply_modes(model: Any, modes: Collection[str], device: torch.device, context_fn: Callable[[], Any]) -> None:
    """Apply execution modes (`distributed.presets.MODES`) to a model that is only trained; see the functions below.

    Raises ValueError for a mode that the model does not work with.
    """
    if "cuda-graph" in modes and has_window(model.config):
        raise ValueError(
            f"{type(model).__name__} has sliding windows, whose masks a CUDA graph cannot hold; leave the mode cuda-graph out."
        )
    use_causal_attention(model)
    if modes:
        gc.collect()  # the model of an earlier run in this process: changed layers refer to themselves
    if "fused" in modes:
        fuse_projections(model)
    if "compile" in modes:
        compile_layers(model, device)
    # Last, so that a compiled layer is computed again as a whole.
    if "recompute" in modes:
        recompute_layers(model, context_fn)


def use_causal_attention(model: Any) -> None:
    """Let a model that never sees padding or a cache attend causally, without a mask.

    The same numbers to the last bit. A model with sliding windows keeps its masks.

    transformers builds masks for the attention names that it has; to see whether one is needed it reads a value from the
    device, which waits for it and which a CUDA graph cannot hold.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if has_window(model.config):
        return
    AttentionInterface.register("epochal_causal", sdpa_attention_forward)
    model.set_attn_implementation("epochal_causal")


def has_window(config: Any) -> bool:
    """Whether some layer attends to the last `sliding_window` tokens only."""
    types = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (types is None or "sliding_attention" in types)


def compile_layers(model: Any, device: torch.device) -> None:
    """Compile each decoder layer and the last norm; float32 changes by rounding only, bf16 is rounded as eagerly.

    Raises ValueError if the machine has no compiler.
    """
    import torch._dynamo.config
    import torch._inductor.config

    if COMPILER == "inductor" and not has_compiler(device):
        needed = "the package triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++, or CXX)"
        raise ValueError(f"compile needs {needed}, which is missing here; install it, or leave the mode out.")
    torch._inductor.config.emulate_precision_casts = True  # round to bf16 wherever the eager layer does
    torch._inductor.config.deterministic = True  # choose kernels by rule: a resumed run must get the same ones
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    # Else a graph made without dropout, which is a hook, would serve a model that has it.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # A layer is far smaller than a bucket of DDP, so there is nothing to split.
    torch._dynamo.config.optimize_ddp = False
    for module in (*decoder_layers(model), last_norm(model)):
        # `forward`, not the module: FSDP2's hooks stay outside. fullgraph: a graph break is an error, not a slower run.
        module.forward = torch.compile(module.forward, backend=COMPILER, dynamic=False, fullgraph=True)


def eager(modes: Collection[str]) -> AbstractContextManager[Any]:
    """Return a context in which compiled layers are computed eagerly."""
    # Only where something is compiled: the import takes seconds.
    context: AbstractContextManager[Any] = nullcontext()
    if "compile" in modes:
        context = torch.compiler.set_stance("force_eager")
    return context


def set_deterministic(on: bool) -> None:
    """Let torch use only algorithms that give the same bits every time, or any."""
    if on:
        # cuBLAS reads it when it is first used: with several streams it may else choose another algorithm each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    # torch would fill every new tensor with NaN in this mode, which finds errors and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = not on  # type: ignore[attr-defined]
    # The backward pass of cuDNN's attention adds in any order, and has no other.
    torch.backends.cuda.enable_cudnn_sdp(not on)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile can build kernels for a device."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def recompute_layers(model: Any, context_fn: Callable[[], Any]) -> None:
    """Compute each layer again in the backward pass instead of keeping its activations.

    The same bits. `context_fn` is that of torch's checkpoint; it restores the state that a layer reads besides its arguments.
    """
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward, context_fn)


def _recomputed(forward: Callable[..., Any], context_fn: Callable[[], Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # The layers draw no numbers from a global generator, so there is none to restore.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn, **kwargs
        )

    return recomputed


def fuse_projections(model: Any) -> None:
    """Compute q, k, v of a Llama as one product, gate and up as another.

    Sums in gradients have another order. The weights stay separate parameters. Raises ValueError for another architecture.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    layers: Any = decoder_layers(model)
    for layer in layers:
        blocks = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if not isinstance(blocks[0], LlamaAttention) or not isinstance(blocks[1], LlamaMLP):
            raise ValueError(f"fused needs the layers of a Llama, got {type(layer).__name__}; leave the mode out.")
        layer.self_attn.forward = _fused_attention(layer.self_attn)
        layer.mlp.forward = _fused_mlp(layer.mlp)


def _fused_attention(attention: Any) -> Callable[..., tuple[Tensor, None]]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def forward(hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> tuple[Tensor, None]:
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        joint = functional.linear(hidden_states, torch.cat([each.weight for each in maps]))
        shape = hidden_states.shape[:-1]
        q, k, v = (
            part.reshape(*shape, -1, attention.head_dim).transpose(1, 2)
            for part in torch.split(joint, [each.out_features for each in maps], dim=-1)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        output, _weights = sdpa_attention_forward(attention, q, k, v, None, scaling=attention.scaling)
        return attention.o_proj(output.reshape(*shape, -1).contiguous()), None

    return forward


def _fused_mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        joint = functional.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        gate, up = joint.chunk(2, dim=-1)
        output: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
        return output

    return forward


def use_bf16_residual(model: Any) -> None:
    """Keep the residual stream in bf16: half its memory and traffic, and another rounding after every layer."""
    # The norms compute in float32 and return its width times their weight, so only the stream itself narrows.
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
