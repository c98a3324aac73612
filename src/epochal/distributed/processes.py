"""How processes share a model: one process, DDP, ZeRO-1, -2, -3 or FSDP2.

The training loop calls `prepare`, then for each step `accumulating`, `backward` and `step`; the rest is for saving.
accelerate starts the processes, DDP and DeepSpeed; FSDP2 is torch's own `fully_shard`.
"""

import contextlib
import copy
import datetime
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment
from torch import Tensor
from torch.distributed.tensor import DTensor

from epochal.distributed.heartbeat import start_heartbeat
from epochal.distributed.presets import Preset, deepspeed_config, read_preset
from epochal.distributed.sharding import Distributed, Replicated, Sharded
from epochal.optim.roles import decoder_layers, head_weight, is_linear

log = logging.getLogger(__name__)


class Processes:
    """The processes of one run. After `prepare`: `wrapped` to call, `optimizer` whose groups hold lr and weight decay.

    clip_norm: the largest L2 norm of the averaged gradient. Raises ValueError for a preset that would change a result.
    """

    # The model with its loss, wrapped by the backend (DistributedDataParallel, DeepSpeedEngine).
    wrapped: Any
    optimizer: Distributed
    # The L2 norm of the last averaged gradient, before clipping.
    norm: Tensor

    def __init__(
        self,
        *,
        clip_norm: float,
        micro_batch: int = 1,
        trackers: Sequence[str] = (),
        folder: Path | None = None,
        modes: Sequence[str] = (),
        timeout: float = 1800.0,
    ) -> None:
        # accelerate launch passes its YAML to the processes as environment variables.
        self.preset = read_preset(os.environ, modes)
        self.clip_norm = clip_norm
        self.accelerator = _accelerator(self.preset, clip_norm, micro_batch, trackers, folder, timeout)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process
        self._heartbeat = start_heartbeat(self.rank, self.world, timeout) if self.world > 1 else None

    @property
    def backend(self) -> str:
        """One of replicated, zero1, zero2, zero3, fsdp2."""
        return self.preset.backend

    @property
    def modes(self) -> tuple[str, ...]:
        """The execution modes of the preset and the run, sorted."""
        return tuple(sorted(self.preset.modes))

    @property
    def rebuilds_buckets(self) -> bool:
        """Whether the first backward pass sums gradients in another order than later ones."""
        return self.backend == "replicated" and self.world > 1

    # --- a step ------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        model_with_loss: torch.nn.Module,
        make_optimizer: Callable[[Any], torch.optim.Optimizer],
        precision: str = "fp32",
    ) -> None:
        """Distribute a module, whose `model` holds all parameters, and its optimizer over the processes.

        `precision`: that of the Run, in which linear maps are gathered where the preset gathers them alone.
        """
        model: Any = model_with_loss.model
        # Before sharding: the first-step check rebuilds the optimizer from whole shapes.
        self._bare, self._make_optimizer = _bare_copy(model, {}), make_optimizer
        # DeepSpeed moves the model itself; under ZeRO-3 it need not fit on one device whole.
        if not self.backend.startswith("zero"):
            model_with_loss.to(self.device)
        # Before the optimizer is built, because `fully_shard` replaces the parameters by DTensors.
        if self.backend == "fsdp2":
            _shard_by_rows(model_with_loss, self.preset, precision)
        self.model, names = model, list(model.named_parameters())
        # Shapes decide which rule steps a parameter. They are whole under every backend, since a DTensor has its
        # global shape.
        optimizer = make_optimizer(model)
        if self.backend == "replicated":
            self.optimizer = Replicated(optimizer, names)
            self.wrapped = self.accelerator.prepare(model_with_loss)
            return
        self.optimizer = Sharded(optimizer, names, self.backend)
        self.wrapped = model_with_loss
        if self.backend.startswith("zero"):
            self.wrapped = self._initialize_deepspeed(model_with_loss)

    def _initialize_deepspeed(self, model_with_loss: torch.nn.Module) -> Any:
        engine, _ = self.accelerator.prepare(model_with_loss, self.optimizer)
        stage, active = int(self.backend.removeprefix("zero")), getattr(engine, "zero_optimization_stage", lambda: 0)()
        # accelerate may silently train as DDP instead, and DeepSpeed may silently replace the optimizer.
        if active != stage or engine.optimizer.optimizer is not self.optimizer:
            raise ValueError(
                f"DeepSpeed runs stage {active} instead of {stage}, or another optimizer than the Run's; use another preset."
            )
        # DeepSpeed's norm is summed in float32 within partitions, so its last bit would differ between stages.
        engine.optimizer.get_grad_norm_direct = lambda gradients, _params: gradient_norm(gradients, shared=True)
        if stage == 3:
            import deepspeed

            # The loss reads the head's weight without calling the head, so ZeRO-3 would not gather it.
            deepspeed.zero.register_external_parameter(model_with_loss, head_weight(model_with_loss.model))
        return engine

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Enclose one micro-batch; DDP and ZeRO exchange gradients after the last one only."""
        if self.backend.startswith("zero"):
            # Without this DeepSpeed counts micro-batches itself, by its configured number.
            self.wrapped.set_gradient_accumulation_boundary(last)
        if self.backend == "replicated" and not last:
            context: AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
            return context
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's part of the loss."""
        if self.backend.startswith("zero"):
            self.wrapped.backward(loss, scale_wrt_gas=False)  # the loss is normalized over the whole step already
        else:
            self.accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip, take one optimizer step and clear the gradients; returns the gradient norm before clipping."""
        if self.backend.startswith("zero"):
            self.wrapped.step()
            # DeepSpeed clips and steps `Sharded` inside its own step.
            self.norm = torch.as_tensor(self.wrapped.get_global_grad_norm())
        else:
            gradients = [p.grad for p in self.wrapped.parameters() if p.grad is not None]
            self.norm = gradient_norm(gradients, self.backend != "replicated")
            clip_gradients(gradients, self.norm, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.norm

    def fresh_optimizer(self, name: str, weight: Tensor) -> tuple[torch.optim.Optimizer, Tensor]:
        """Return a new optimizer as one process alone would build it.

        Also returns its parameter `name`, which holds a copy of `weight`; the other parameters have no memory.
        """
        model = _bare_copy(self._bare, {name: weight.clone()})
        return self._make_optimizer(model), dict(model.named_parameters())[name]

    # --- among processes ---------------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the CPU."""
        if self.world == 1:
            return value.cpu()
        total: Tensor = self.accelerator.reduce(value.to(self.device), "sum")
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Return the picklable value of every process, in order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the trackers and wait for all processes."""
        # The process group stays open: a worker may train another run in it.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.wait()
        if self._heartbeat is not None:
            self._heartbeat.stop()

    # --- whole tensors, in which all processes must take part --------------------------------------------------------

    def whole_weight(self, parameter: Tensor) -> Tensor:
        """Return a copy of a whole weight."""
        if self.backend != "zero3":
            return whole(parameter.detach()).clone()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def whole_gradient(self, parameter: Tensor) -> Tensor:
        """Return the averaged gradient of a parameter between `backward` and `step`, gathered by the backend."""
        if self.backend.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad

            gradient: Tensor = safe_get_full_grad(parameter)
            return gradient.float()
        assert parameter.grad is not None
        return whole(parameter.grad).clone()

    def weights_on_main(self) -> dict[str, Tensor]:
        """Return all whole weights by name on the main process, on the CPU; nothing on the others.

        A tied weight is in it once.
        """
        # One parameter at a time, so the peak is one whole weight on the device.
        weights = {}
        for entry in self.optimizer.entries:
            weight = self.whole_weight(entry.parameter)
            if self.is_main:
                weights[entry.name] = weight.cpu()
        return weights

    def whole_model(self, build: Callable[[], Any]) -> Any:
        """Return the model with whole weights on the main process, None on the others.

        A sharded model is gathered into a new one from `build`.
        """
        if self.backend not in ("zero3", "fsdp2"):
            return self.model if self.is_main else None
        weights = self.weights_on_main()
        if not self.is_main:
            return None
        model = build()
        # Not strict: a tied head is not among the weights.
        model.load_state_dict(weights, strict=False)
        return model


def gradient_norm(gradients: Sequence[Tensor], shared: bool) -> Tensor:
    """Return the L2 norm of all gradients, 0-d float64; `shared`: every process holds a part of them."""
    # In float64 every sharding gives the same norm to the last bit of a float32. The clipping factor multiplies all
    # updates, and in bf16 a difference in its last bit can grow to 1e-2 nats within a few hundred steps.
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in local]).sum()
    if shared:
        torch.distributed.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients in-place so that their norm is at most `clip_norm`."""
    # The same formula as DeepSpeed's, for equal numbers under every preset.
    factor = 1 / ((norm + 1e-6) / clip_norm).clamp(min=1)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(local, factor.float())


def whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor; return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _bare_copy(model: torch.nn.Module, data: dict[str, Tensor]) -> Any:
    """Copy a model; parameters without `data` are expanded scalars, which have the shape but no memory."""
    parameters = {
        id(p): torch.nn.Parameter(data[name] if name in data else p.detach().new_zeros(()).expand(p.shape))
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, parameters)  # as deepcopy's memo: these count as copied already


def _shard_by_rows(model_with_loss: torch.nn.Module, preset: Preset, precision: str) -> None:
    """Shard a model with FSDP2: one unit for each transformer block, and the root for all else."""
    # Not accelerate's FSDP2: it needs GPUs, and replaces the parameters of an optimizer that exists already.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Autocast would cast these weights to bf16 after gathering them in float32, so the products have the same bits. Whole
    # blocks cannot be gathered so: their norms compute with float32 weights.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in decoder_layers(model_with_loss.model):
        if preset.gather_linears:
            linears: list[torch.nn.Module] = [module for module in block.modules() if is_linear(module)]
            fully_shard(linears, reshard_after_forward=preset.reshard_after_forward, mp_policy=policy)
        else:
            fully_shard(block, reshard_after_forward=preset.reshard_after_forward)
    fully_shard(model_with_loss, reshard_after_forward=False)


def _accelerator(
    preset: Preset,
    clip_norm: float,
    micro_batch: int,
    trackers: Sequence[str],
    folder: Path | None,
    timeout: float,
) -> Accelerator:
    # One worker trains many runs, and accelerate would keep the settings of the first.
    AcceleratorState._reset_state(reset_partial_state=False)
    on_cpu = not torch.accelerator.is_available()
    settings: dict[str, Any] = {
        "mixed_precision": "no",  # autocast is inside the wrapped model, so no backend keeps 16-bit weights
        "log_with": list(trackers) or None,
        "project_dir": None if folder is None else str(folder),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout))],
    }
    if not preset.deepspeed:
        # Gradients live in DDP's buckets: one copy of them less, 4 bytes a parameter.
        settings["kwargs_handlers"].append(DistributedDataParallelKwargs(gradient_as_bucket_view=True))
        # FSDP2 is applied in `prepare` and layers are compiled by the training loop, so accelerate must not see either.
        # With cpu=True processes communicate by gloo.
        with patch_environment(ACCELERATE_USE_FSDP="false", ACCELERATE_DYNAMO_BACKEND="no"):
            return Accelerator(cpu=on_cpu, **settings)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Otherwise DeepSpeed compiles a shared-memory operation at the first start; gloo does not need it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Not Accelerator(cpu=True): that silently trains as DDP.
        settings["kwargs_handlers"] = [
            InitProcessGroupKwargs(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        ]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = deepspeed_config(preset, micro_batch=micro_batch, world=world, clip_norm=clip_norm)
    with _quiet_deepspeed(), patch_environment(ACCELERATE_DYNAMO_BACKEND="no"):
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False), **settings)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Keep DeepSpeed's banner out of the log of a run."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
