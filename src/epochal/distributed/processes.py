"""The one place that knows how processes share a model: one process, DDP, ZeRO-1, -2, -3 or FSDP2.

The training loop calls `prepare`, then for each step `accumulating`, `backward` and `step`; the rest is for saving.
accelerate gives the processes, DDP and DeepSpeed. FSDP2 is torch's own `fully_shard`, called here: accelerate's works
on GPUs only, and puts new parameters under an optimizer that was built before. Precision is autocast inside the
objective, so no backend keeps 16-bit weights.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, patch_environment
from torch import Tensor
from torch.distributed.tensor import DTensor

from epochal.distributed.presets import Profile, deepspeed_config, read_profile
from epochal.distributed.sharding import Distributed, Replicated, Sharded

log = logging.getLogger(__name__)


class Processes:
    """The processes of one run. After `prepare`: `objective` to call, `optimizer` whose groups carry the numbers.

    clip_norm: the largest L2 norm of the averaged gradient. Raises ValueError for a profile that would change a result.
    """

    objective: Any
    optimizer: Distributed
    norm: Tensor
    """The L2 norm of the last averaged gradient, before clipping."""

    def __init__(
        self, *, clip_norm: float, micro_batch: int = 1, trackers: Sequence[str] = (), folder: Path | None = None
    ) -> None:
        self.profile = read_profile(os.environ)
        self.clip_norm = clip_norm
        self.accelerator = _accelerator(self.profile, clip_norm, micro_batch, trackers, folder)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main: bool = self.accelerator.is_main_process

    @property
    def backend(self) -> str:
        """One of replicated, zero1, zero2, zero3, fsdp2."""
        return self.profile.backend

    # --- a step ------------------------------------------------------------------------------------------------------

    def prepare(self, objective: torch.nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        """Share an objective, whose `model` holds all parameters, out over the processes, with its optimizer."""
        model: Any = objective.model
        self._bare, self._make_optimizer = _bare_copy(model, {}), make_optimizer
        if not self.backend.startswith("zero"):
            objective.to(self.device)
        if self.backend == "fsdp2":
            _shard_by_rows(objective, self.profile.reshard_after_forward)
        self.model, names = model, list(model.named_parameters())
        optimizer = make_optimizer(model)
        if self.backend == "replicated":
            self.optimizer = Replicated(optimizer, names)
            self.objective = self.accelerator.prepare(objective)
            return
        self.optimizer = Sharded(optimizer, names, self.backend)
        self.objective = objective
        if self.backend.startswith("zero"):
            self.objective = self._initialise_deepspeed(objective)

    def _initialise_deepspeed(self, objective: torch.nn.Module) -> Any:
        engine, _ = self.accelerator.prepare(objective, self.optimizer)
        stage, taken = int(self.backend.removeprefix("zero")), getattr(engine, "zero_optimization_stage", lambda: 0)()
        # accelerate may train as DDP instead, and DeepSpeed may put another optimizer in; neither says so.
        if taken != stage or engine.optimizer.optimizer is not self.optimizer:
            raise ValueError(f"DeepSpeed did not take up stage {stage} with the Run's optimizer; use another profile.")
        # DeepSpeed's own sums float32 within its partitions, and so clips by a last bit more or less in every stage.
        engine.optimizer.get_grad_norm_direct = lambda gradients, _params: gradient_norm(gradients, shared=True)
        if stage == 3:
            import deepspeed

            # The loss reads the head's weight without calling the head.
            deepspeed.zero.register_external_parameter(objective, objective.model.lm_head.weight)  # type: ignore[union-attr]
        return engine

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Enclose one micro-batch: gradients are exchanged after the last one only, where that saves something."""
        if self.backend.startswith("zero"):
            self.objective.set_gradient_accumulation_boundary(last)
        if self.backend == "replicated" and not last:
            context: AbstractContextManager[Any] = self.accelerator.no_sync(self.objective)
            return context
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""
        if self.backend.startswith("zero"):
            self.objective.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def step(self) -> Tensor:
        """Clip, take one optimizer step and forget the gradients; returns the gradient norm before clipping."""
        if self.backend.startswith("zero"):
            self.objective.step()
            self.norm = torch.as_tensor(self.objective.get_global_grad_norm())
        else:
            gradients = [p.grad for p in self.objective.parameters() if p.grad is not None]
            self.norm = gradient_norm(gradients, self.backend != "replicated")
            clip_gradients(gradients, self.norm, self.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.norm

    def fresh_optimizer(self, name: str, weight: Tensor) -> tuple[torch.optim.Optimizer, Tensor]:
        """Return the optimizer as a process alone would build it, and that of its parameters which has data: a copy of `weight`."""
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
        """Return the plain value of every process, in order of ranks."""
        found = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Close the trackers and wait for all. The process group stays: a worker may train another run in it."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.wait()

    # --- whole tensors, in which all processes must take part --------------------------------------------------------

    def whole_weight(self, parameter: Tensor) -> Tensor:
        """Return a copy of a whole weight."""
        if self.backend != "zero3":
            return whole(parameter.detach()).clone()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def whole_gradient(self, parameter: Tensor) -> Tensor:
        """Return the averaged gradient of a parameter between `backward` and `step`, by the backend's own means."""
        if self.backend.startswith("zero"):
            from deepspeed.utils import safe_get_full_grad

            found: Tensor = safe_get_full_grad(parameter)
            return found.float()
        assert parameter.grad is not None
        return whole(parameter.grad).clone()

    def weights_on_main(self) -> dict[str, Tensor]:
        """Return all whole weights by name on the CPU of the main process, a tied one once; nothing on the others."""
        found = {}
        for entry in self.optimizer.entries:
            weight = self.whole_weight(entry.parameter)
            if self.is_main:
                found[entry.name] = weight.cpu()
        return found

    def whole_model(self, build: Callable[[], Any]) -> Any:
        """Return the model with its whole weights on the main process, a new one from `build` if need be; else None."""
        if self.backend not in ("zero3", "fsdp2"):
            return self.model if self.is_main else None
        weights = self.weights_on_main()
        if not self.is_main:
            return None
        model = build()
        model.load_state_dict(weights, strict=False)
        return model


def gradient_norm(gradients: Sequence[Tensor], shared: bool) -> Tensor:
    """Return the L2 norm of all gradients, 0-d; `shared`: every process holds a part of them.

    In float64, so that every way to share them out gives the same number to the last bit of a float32: the factor of
    clipping multiplies all weights' updates, and in bf16 its last bit can grow to 1e-2 nats within a few hundred steps.
    """
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in local]).sum()
    if shared:
        torch.distributed.all_reduce(squares)
    return squares.sqrt()


def clip_gradients(gradients: Sequence[Tensor], norm: Tensor, clip_norm: float) -> None:
    """Multiply gradients so that their norm is at most `clip_norm`: by the factor that DeepSpeed takes."""
    factor = 1 / ((norm + 1e-6) / clip_norm).clamp(min=1)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(local, factor.float())


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor as a whole tensor, another as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _bare_copy(model: torch.nn.Module, data: dict[str, Tensor]) -> Any:
    """Return a copy of a model whose parameters have their shapes, and memory only where data is given."""
    parameters = {
        id(p): torch.nn.Parameter(data[name] if name in data else p.detach().new_zeros(()).expand(p.shape))
        for name, p in model.named_parameters()
    }
    return copy.deepcopy(model, parameters)  # the memo: what has been copied already


def _shard_by_rows(objective: torch.nn.Module, reshard: bool) -> None:
    """Shard a model over all processes with FSDP2: each block of layers for itself, the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    for block in getattr(getattr(objective.model, "model", None), "layers", ()):
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(objective, reshard_after_forward=False)


def _accelerator(
    profile: Profile, clip_norm: float, micro_batch: int, trackers: Sequence[str], folder: Path | None
) -> Accelerator:
    # One worker trains many runs; accelerate keeps the settings of the first one unless told to forget it.
    AcceleratorState._reset_state(reset_partial_state=False)
    on_cpu = not torch.accelerator.is_available()
    settings: dict[str, Any] = {
        "mixed_precision": "no",  # autocast is in the objective
        "log_with": list(trackers) or None,
        "project_dir": None if folder is None else str(folder),
    }
    if not profile.deepspeed:
        # accelerate must not see FSDP2, which is applied here; without a device, processes speak through gloo.
        with patch_environment(ACCELERATE_USE_FSDP="false"):
            return Accelerator(cpu=on_cpu, **settings)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # Where it can, DeepSpeed compiles an operation for CPU processes at every first start; gloo needs none.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Not Accelerator(cpu=True): that trains as DDP and says nothing.
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="gloo")]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    config = deepspeed_config(profile, micro_batch=micro_batch, world=world, clip_norm=clip_norm)
    with _quiet_deepspeed():
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
