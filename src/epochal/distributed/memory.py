"""GPU memory of one process of a run, estimated from its model file.

N parameters, V vocabulary, h width, L layers, q = heads x head_dim, k = kv heads x head_dim, f the inner size of the MLP.
Checked for Llamas against the peak that one H100 reported (benchmarks/training_gpu.csv): within 5%. Without torch.
"""

from dataclasses import dataclass, replace

from epochal.distributed.presets import Preset
from epochal.models.config import Shape, parameter_counts, read_config, shape_of
from epochal.run import Run

# Memory of one device in bytes, by a part of its name.
DEVICE_BYTES = {"H200": 141e9, "H100": 80 * 2**30, "A100": 80 * 2**30, "L40S": 48 * 2**30, "RTX 4090": 24 * 2**30}

# Elements of a chunk of logits on a GPU (`epochal.loss`).
LOGIT_CHUNK = 2**28

# Share of the device that may be planned: the rest is CUDA's context and what the allocator cannot use.
USABLE = 0.92


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process."""

    states: float  # weights, gradients and two moments in float32, as AdamW keeps them; other optimizers need less or as much
    gathered: float  # whole weights that a sharded backend holds for a while
    activations: float
    head: float  # a chunk of logits, gradients of the head and of the hidden states
    regularizer: float = 0.0  # what it keeps of the text, the weights and the gradients

    @property
    def total(self) -> float:
        """The sum."""
        return self.states + self.gathered + self.activations + self.head + self.regularizer


def estimate_memory(
    run: Run, micro_batch: int, *, world: int, preset: Preset, vocab_size: int | None = None
) -> MemoryEstimate:
    """Return the memory of a process that trains `micro_batch` sequences at once; an online teacher comes on top."""
    config = read_config(run.model, vocab_size=vocab_size)
    counts, tokens = parameter_counts(config), micro_batch * run.sequence_length
    shape, V = shape_of(config), config["vocab_size"]
    h = shape.width
    vocabulary = counts.total - counts.non_embedding
    layer = counts.non_embedding / shape.layers
    whole, shared = {
        "replicated": (16, 0),
        "zero1": (8, 12),  # DeepSpeed keeps a second float32 copy of the weights that a process steps
        "zero2": (4, 16),
        "zero3": (0, 20),
        "fsdp2": (0, 16),
    }[preset.backend]
    average = 0 if run.weight_averaging == "last" else 4
    # Of an anchor: the weights to start from, and their Fisher information.
    anchor = 0 if run.anchor is None else 8 if run.anchor.fisher else 4
    # Embedding and head are one group, gathered during the whole step with its gradients; of the layers two at a time.
    gathered = 8 * vocabulary + 2 * 4 * layer if preset.backend in ("zero3", "fsdp2") and world > 1 else 0
    passes = 2 if run.input_mask_prob else 1
    return MemoryEstimate(
        states=counts.total * (whole + average + anchor + shared / world),
        gathered=gathered,
        activations=passes * tokens * _activation_bytes(shape, run, preset),
        head=4.0 * min(LOGIT_CHUNK, tokens * V) + 4.0 * V * h + 8.0 * tokens * h,
        regularizer=_regularizer_bytes(run, counts.total, tokens, V, h),
    )


def _regularizer_bytes(run: Run, weights: int, tokens: int, vocab_size: int, width: int) -> float:
    choice = run.regularizer
    if choice is None:
        return 0.0
    # A float16 distribution for every position of the text.
    stored = 2.0 * (run.unique_tokens - run.holdout_tokens) * vocab_size if choice.per_position else 0.0
    # Such a loss has whole rows of a micro-batch: logits, probabilities and their gradient.
    rows = 12.0 * tokens * vocab_size if choice.has_loss and not choice.more_heads else 0.0
    # A linear map with its gradient and two moments, its outputs and inputs with theirs, and another gradient of the head.
    heads = 4.0 * choice.more_heads * width * (4 * width + 4 * tokens + vocab_size)
    return 4.0 * choice.copies * weights + stored + rows + heads


def _activation_bytes(shape: Shape, run: Run, preset: Preset) -> float:
    """Return what the backward pass needs of one token, in bytes."""
    h, f, L = shape.width, shape.inner, shape.layers
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stream = 2 if run.residual == "bfloat16" else 4
    width = 2 if run.precision == "bf16" else 4
    # Two norms keep their input and its normalized form; autocast casts the output of one for q, k and v and of the other
    # for gate and up, each for itself. Attention keeps q, k, v and its output, before and after rearrangement.
    casts = 5 if width == 2 else 4
    eager = 4 * stream * h + casts * width * h + 3 * width * q + 2 * width * k + 4 * width * f
    # Fused kernels keep the inputs of the norms and one copy of each output.
    compiled = 2 * stream * h + 2 * width * h + 3 * width * q + 2 * width * k + 3 * width * f
    layer: float = compiled if "compile" in preset.modes else eager
    # Of every layer its input, and all of the one that is computed again.
    return float(stream * h * L + layer if "recompute" in preset.modes else layer * L)


def fitting_micro_batches(
    run: Run, device_bytes: float, *, world: int, preset: Preset, vocab_size: int | None = None
) -> list[int]:
    """Return the micro-batches that fit, of those that divide the share of a process; empty if none does."""
    share = max(1, run.batch_size // world)
    return [
        size
        for size in range(1, share + 1)
        if share % size == 0
        and estimate_memory(run, size, world=world, preset=preset, vocab_size=vocab_size).total <= USABLE * device_bytes
    ]


def memory_problem(
    run: Run, micro_batch: int | None, device_bytes: float, *, world: int, preset: Preset, vocab_size: int | None = None
) -> str | None:
    """Return a sentence if a run will not fit on its devices, with what would; None if it fits."""
    size = micro_batch or max(1, run.batch_size // world)
    needed = estimate_memory(run, size, world=world, preset=preset, vocab_size=vocab_size).total
    if needed <= USABLE * device_bytes:
        return None
    fitting = fitting_micro_batches(run, device_bytes, world=world, preset=preset, vocab_size=vocab_size)
    remedy = (
        f"use --micro-batch {max(fitting)}"
        if fitting
        else "use --mode recompute, more processes, or a preset that shards the model (fsdp2)"
    )
    return (
        f"Run {run.name!r} needs about {needed / 1e9:.0f} GB on each of {world} devices of {device_bytes / 1e9:.0f} GB "
        f"with a micro-batch of {size} ({preset.backend}); {remedy}."
    )


def describe_fitting(run: Run, device_bytes: float, *, world: int, vocab_size: int | None = None) -> str:
    """Return a line with the largest micro-batch that fits, by preset and mode."""
    presets = {"one process": Preset()} if world == 1 else {"ddp": Preset(), "fsdp2": Preset("fsdp2")}
    parts = []
    for name, preset in presets.items():
        for mode in ("", "compile", "recompute"):
            changed = replace(preset, modes=frozenset({mode} if mode else ()))
            fitting = fitting_micro_batches(run, device_bytes, world=world, preset=changed, vocab_size=vocab_size)
            parts.append(f"{name}{' ' * bool(mode)}{mode} {max(fitting) if fitting else 'none'}")
    where = f"{run.model} at {run.sequence_length:,} tokens"
    return f"largest micro-batch of {where} in {device_bytes / 1e9:.0f} GB, estimated: {', '.join(parts)}"


def device_bytes(name: str) -> float | None:
    """Return the memory of a device by its name, None for an unknown one."""
    return next((size for part, size in DEVICE_BYTES.items() if part in name), None)
