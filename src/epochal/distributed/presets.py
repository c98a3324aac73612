"""Parallelism presets: how a model is distributed over processes and how fast it trains, never what is computed.

`accelerate launch` passes a preset (a YAML of configs/accelerate) in environment variables. This module reads them and
refuses every setting that would change a result, or that has not been tested to leave it unchanged. It does not import
torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from epochal.config import find_config, nearest, read_json
from epochal.ranges import Range, shown
from epochal.run import Run

# Execution modes of a run, by name; `epochal run --mode NAME`.
MODES = {
    "compile": "decoder layers are compiled (torch.compile); rounding of float32 sums changes",
    "cuda-graph": "forward and backward are one CUDA graph, for small models on one GPU; the same bits",
    "deterministic": "only algorithms that give the same bits every time; slower attention",
    "fused": "q, k, v are one product, and gate and up; rounding of gradients changes",
    "recompute": "activations are computed again in the backward pass, which saves memory; the same bits",
}

DEEPSPEED_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}
ZERO_KEYS = {
    "stage",
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
}
OFFLOAD_KEYS = {"device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"}
# Keys of all three tables that hold true or false, and those that hold a number or "auto".
FLAGS = {
    "allgather_partitions",
    "contiguous_gradients",
    "overlap_comm",
    "pin_memory",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
NUMBERS = {
    "allgather_bucket_size",
    "buffer_count",
    "buffer_size",
    "max_in_cpu",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "steps_per_print",
    "sub_group_size",
}
SIZE = Range(0, 10**15)

# Keys that follow from the Run; a preset leaves them out or sets them to "auto".
FROM_THE_RUN = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)

REASONS = {
    "optimizer": "the Run names the optimizer",
    "scheduler": "the Run names the schedule",
    "fp16": "the Run names the precision, and a dynamic loss scale skips steps",
    "bf16": "the Run names the precision, and 16-bit weights change the result",
    "amp": "the Run names the precision",
    "torch_autocast": "the Run names the precision",
    "data_types": "gradients are kept in float32",
    "communication_data_type": "gradients are averaged in float32",
    "prescale_gradients": "the average of gradients is the Run's",
    "gradient_predivide_factor": "the average of gradients is the Run's",
    "round_robin_gradients": "DeepSpeed's own map of parameters is wrong under it",
    "elastic_checkpoint": "it loses the state held by owners; epochal's checkpoints resume on any number of processes",
    "zenflow": "it steps parameters with a second optimizer",
    "super_offload": "it steps parameters with a second optimizer",
    "zero_hpz_partition_size": "it is not tested with matrix optimizers",
    "zero_quantized_weights": "quantized weights change the result",
    "zero_quantized_gradients": "quantized gradients change the result",
    "zero_quantized_nontrainable_weights": "quantized weights change the result",
    "mics_shard_size": "it is not tested with matrix optimizers",
    "parameter_alignment": "it is not tested with matrix optimizers",
    "pipeline": "pipeline parallelism is not supported",
    "tensor_parallel": "tensor parallelism splits matrices",
    "sequence_parallel_size": "sequence parallelism is not supported",
    "expert_parallel": "experts are several matrices in one tensor",
    "ratio": "the rest would be stepped by a second optimizer",
    "nvme_path": "offload to NVMe is not tested with matrix optimizers",
}


@dataclass(frozen=True)
class Preset:
    """How the processes of a launch share a model, and how each of them computes."""

    backend: str = "replicated"  # replicated, zero1, zero2, zero3 or fsdp2
    deepspeed: dict[str, Any] = field(default_factory=dict)  # DeepSpeed's config; empty for the others
    reshard_after_forward: bool = True  # of FSDP2
    gather_linears: bool = False  # FSDP2 gathers the linear maps of a layer alone, in the precision of the Run
    modes: frozenset[str] = frozenset()  # keys of MODES


# --- checks -----------------------------------------------------------------------------------------------------------


def read_preset(environment: Mapping[str, str], modes: Sequence[str] = ()) -> Preset:
    """Return the preset that `accelerate launch` put into the environment, with further modes.

    Raises ValueError for a preset that would change a result, and for an unknown mode.
    """
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown{nearest(mode, MODES)}; choose from {', '.join(MODES)}.")

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1")

    # Autocast is inside the wrapped model; accelerate must not add a second one.
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise ValueError(
            f"the preset sets mixed_precision to {precision!r}, but the Run sets the precision; write 'no'."
        )
    # The batch is the Run's; only its split into micro-batches is a matter of speed.
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        raise ValueError("the preset sets gradient_accumulation_steps; leave it out and give --micro-batch instead.")
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto") not in ("auto", "none"):
        raise ValueError("the preset sets gradient_clipping; leave it out, the Run's clip_norm is used.")
    for name, what in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, sequence or hybrid parallelism"),
    ):
        if on(name):
            raise ValueError(f"the preset uses {what}, which splits matrices; use ddp, zero1-3 or fsdp2.")
    preset = Preset()
    if on("ACCELERATE_USE_DEEPSPEED"):
        preset = _deepspeed_preset(environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    elif on("ACCELERATE_USE_FSDP"):
        preset = _fsdp_preset(environment)
    own = {"compile"} if _compiles(environment) else set()
    return replace(preset, modes=preset.modes | own | set(modes))


def _compiles(environment: Mapping[str, str]) -> bool:
    """Whether the preset has dynamo_config with the backend INDUCTOR, which stands for the mode "compile"."""
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "inductor"):
        raise ValueError(f"the preset sets dynamo_backend to {backend.upper()}; write INDUCTOR, or leave it out.")
    for name, default in (
        ("MODE", "default"),
        ("USE_FULLGRAPH", "false"),
        ("USE_DYNAMIC", "false"),
        ("USE_REGIONAL_COMPILATION", "false"),
    ):
        value = environment.get(f"ACCELERATE_DYNAMO_{name}", default)
        if backend != "no" and value.lower() != default:
            raise ValueError(
                f"the preset sets dynamo_{name.lower()} to {value!r}, but layers are compiled one way; leave it out."
            )
    return backend != "no"


def check_modes(preset: Preset, run: Run, *, world: int, device: str) -> None:
    """Raise ValueError if a mode does not work with the Run, preset or device.

    `device` is torch's name of it: "cpu", "cuda".
    """
    # Their hooks gather a weight when its module is called: inside a layer that is compiled, or not at all.
    where, broken = "zero3", preset.modes & {"compile", "fused", "recompute"}
    if preset.gather_linears:
        where, broken = "a preset that gathers linear maps", preset.modes & {"compile", "fused"}
    if broken and (preset.gather_linears or preset.backend == "zero3"):
        raise ValueError(
            f"the mode {min(broken)} does not work under {where}, which gathers weights inside a layer; use fsdp2 or zero2."
        )
    if "cuda-graph" in preset.modes:
        _check_cuda_graph(preset, run, world, device)
    if run.regularizer is not None:
        _check_regularizer(preset, run, world)


def _check_regularizer(preset: Preset, run: Run, world: int) -> None:
    kind, reach = type(run.regularizer).__name__, run.regularizer.reach if run.regularizer else "any"
    if reach == "whole" and preset.backend != "replicated":
        raise ValueError(
            f"Run {run.name!r} has the regularizer {kind}, which needs the whole gradient of a matrix, and {preset.backend} "
            "shards gradients; use one process or ddp."
        )
    if reach == "one" and (world > 1 or preset.backend != "replicated"):
        raise ValueError(
            f"Run {run.name!r} has the regularizer {kind}, which works in one process, and this is {preset.backend} with "
            f"{world}; use the preset gpu or cpu with one process."
        )


def _check_cuda_graph(preset: Preset, run: Run, world: int, device: str) -> None:
    reasons = {
        "this machine has no CUDA device": device != "cuda",
        f"the run has {world} processes": world > 1 or preset.backend != "replicated",
        "dropout and masked inputs draw new numbers in every step": bool(run.dropout or run.input_mask_prob),
        "the regularizer changes weights, inputs or targets in every step": run.regularizer is not None,
        "cached soft targets are read from disk in every step": run.teach is not None and run.teach.mode == "cached",
        "a graph keeps all activations anyway, so recompute saves nothing": "recompute" in preset.modes,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"Run {run.name!r} cannot use the mode cuda-graph, a graph of one process: {reason}; leave the mode out."
            )


def _deepspeed_preset(name: str) -> Preset:
    if name in ("none", ""):
        raise ValueError("the DeepSpeed preset has no deepspeed_config_file; set it to a file of configs/deepspeed.")
    path = Path(name) if Path(name).is_file() else find_config("deepspeed", Path(name).stem, ".json")
    try:
        table = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from None
    check_deepspeed(table, str(path))
    return Preset(f"zero{table['zero_optimization']['stage']}", table)


def check_deepspeed(table: dict[str, Any], where: str) -> None:
    """Raise ValueError for a DeepSpeed config that would change a result or is not tested."""
    # An allow-list, so that a key of a newer DeepSpeed cannot slip through.
    zero = _table(table, "zero_optimization", where)
    _check_keys(table, DEEPSPEED_KEYS, where)
    _check_keys(zero, ZERO_KEYS, f"{where}: zero_optimization")
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise ValueError(f"{where}: stage is {shown(zero.get('stage'))}; choose 1, 2 or 3, or the preset ddp for none.")
    for key in FROM_THE_RUN:
        if table.get(key, "auto") != "auto":
            raise ValueError(f'{where}: {key} is {shown(table[key])}, which would change the Run; write "auto".')
    for part in ("offload_optimizer", "offload_param"):
        offload = _table(zero, part, where)
        _check_keys(offload, OFFLOAD_KEYS, f"{where}: {part}")
        if offload.get("device", "none") not in ("none", "cpu"):
            raise ValueError(
                f'{where}: {part} to {shown(offload["device"])} is not tested with matrix optimizers; use "cpu".'
            )
    if _table(zero, "offload_param", where).get("device") == "cpu" and zero["stage"] != 3:
        raise ValueError(f"{where}: offload_param needs stage 3; choose it, or leave offload_param out.")
    offloads = _table(zero, "offload_optimizer", where).get("device") == "cpu"
    if offloads and table.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"{where}: with offload_optimizer, DeepSpeed silently replaces the Run's optimizer with its own Adam; write "
            '"zero_force_ds_cpu_optimizer": false.'
        )


def _table(parent: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a nested table, empty if it is missing or null."""
    table = {} if parent.get(key) is None else parent[key]
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {key} must be a table, got {shown(table)}.")
    return table


def _check_keys(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in table.items():
        # A key that is switched off changes nothing, even if it is unknown.
        off = value in (False, None, 0, {}) or (isinstance(value, dict) and value.get("enabled") is False)
        if key not in known and not off:
            raise ValueError(
                f"{where}: {shown(key)} is refused: {REASONS.get(key, 'it is not known to leave results unchanged')}."
            )
        if key in FLAGS and not isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be true or false, got {shown(value)}.")
        if key in NUMBERS and value != "auto":
            SIZE.check(value, f"{where}: {key}", float)


# Numbers of a launch file, an accelerate YAML.
LAUNCH_NUMBERS = {
    "num_processes": Range(1, 100_000),
    "num_machines": Range(1, 100_000),
    "machine_rank": Range(0, 100_000),
    "main_process_port": Range(0, 65_535),
}


def read_launch_file(path: Path) -> dict[str, Any]:
    """Read an accelerate YAML; raises ValueError for one that is not a table or has impossible numbers."""
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not valid YAML: {reason}; correct it.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path} must be a table of key: value lines, got {shown(table)}.")
    for key, within in LAUNCH_NUMBERS.items():
        if table.get(key) is not None:
            within.check(table[key], f"{path}: {key}")
    return table


def processes_of(path: Path) -> int:
    """Return how many processes a launch file starts on each machine; 1 where it does not say."""
    return int(read_launch_file(path).get("num_processes") or 1)


def check_micro_batch(micro_batch: int | None, share: int) -> None:
    """Raise ValueError for a micro-batch that does not divide each process's share of a batch."""
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise ValueError(
            f"micro-batch {micro_batch} does not divide the {share} sequences of each process; use a divisor."
        )


def _fsdp_preset(environment: Mapping[str, str]) -> Preset:
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(f"fsdp_version is {version}: FSDP1 flattens matrices and is refused; write fsdp_version: 2.")
    for name, what in (
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "fsdp_activation_checkpointing_offload"),
    ):
        if environment.get(name, "false").lower() == "true":
            raise ValueError(f"{what} is not tested with matrix optimizers; write false, or use zero3-offload.")
    wrapped = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if wrapped not in ("", "Linear"):
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap is {wrapped!r}; leave it out to gather whole decoder layers, or write "
            "Linear to gather the linear maps of each layer in the precision of the Run."
        )
    recompute = environment.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    return Preset(
        "fsdp2",
        reshard_after_forward=reshard not in ("false", "no_shard", "shard_grad_op"),
        gather_linears=bool(wrapped),
        modes=frozenset({"recompute"} if recompute else ()),
    )


def deepspeed_config(preset: Preset, *, micro_batch: int, world: int, clip_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's config of a run: the preset's, completed by what follows from the Run."""
    return {
        **preset.deepspeed,
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * world,
        "gradient_accumulation_steps": 1,  # the training loop sums micro-batches, so DeepSpeed must not divide by them
        "gradient_clipping": clip_norm,  # always set: DeepSpeed's default is 1.0, not off
        "zero_allow_untested_optimizer": True,
    }
