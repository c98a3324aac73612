"""The training loop: one Run in, one model folder and one record out. Read it from top to bottom.

B is the global batch in sequences, T the sequence length. The batch at a step is a function of the Run alone; processes
take equal slices of it, micro-batches slices of those, and the loss is normalised by the targets of the whole step, so
neither changes a result beyond rounding.
"""

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from epochal.checkpoint import load_checkpoint, save_checkpoint
from epochal.data import Batches, Tokens, TokenStore, open_store, sampled_stream
from epochal.loss import backend, cross_entropy, token_log_probs
from epochal.model import build_model, next_token, parameter_counts, start_from
from epochal.noise import MASKED_WEIGHT, Noise
from epochal.optim.build import build_optimizer, matrices_treated, spectral_norms, state_bytes
from epochal.provenance import provenance, utilisation
from epochal.records import Record, Workspace, input_marks, load_records
from epochal.run import Run, fingerprint
from epochal.schedule import decay_multiplier, multiplier
from epochal.step_clock import StepClock
from epochal.stopping import Stopped, stop_reason
from epochal.teacher import Teacher, load_teacher
from epochal.weight_average import WeightAverage

log = logging.getLogger(__name__)

LOG_STEPS = 10
"""Steps between two lines of metrics.jsonl, two checks for a non-finite loss, and two looks at a stop request."""

EVALUATION_TOKENS = 2**14
"""Tokens in one forward pass of an evaluation."""


@dataclass(frozen=True)
class Pace:
    """How fast, never what: sequences a process takes at once (None: all of its share), trackers, checkpoints."""

    micro_batch: int | None = None
    trackers: tuple[str, ...] = ()
    checkpoint_seconds: float = 300.0
    profile: str = "here"


class Objective(torch.nn.Module):
    """A causal language model that returns its loss, so that logits are never whole and DDP sees one forward."""

    def __init__(self, model: Any, noise: Noise, teacher: Teacher | None) -> None:
        super().__init__()
        self.model, self.noise, self.teacher = model, noise, teacher

    def forward(self, tokens: torch.Tensor, first_row: int, normaliser: float) -> torch.Tensor:
        """Return the summed loss of (b, T) tokens, the run's rows from `first_row`, over `normaliser`: float32 scalar."""
        rows, head = range(first_row, first_row + len(tokens)), self.model.lm_head.weight
        self.noise.begin(rows)
        hidden, targets = next_token(self.model, tokens)
        if self.teacher is None:
            loss = cross_entropy(hidden, head, targets, normaliser=normaliser)
        else:
            loss = self.teacher.loss(hidden, head, targets, tokens, rows, normaliser)
        if self.noise.masking:
            self.noise.begin(rows, "masked")
            hidden, targets = next_token(self.model, tokens, self.noise.hide(self.model.model.embed_tokens(tokens)))
            loss = loss + MASKED_WEIGHT * cross_entropy(hidden, head, targets, normaliser=normaliser)
        return loss


def train(run: Run, workspace: Workspace, pace: Pace = Pace()) -> Record | None:
    """Train one Run to its end and return its record (on the main process; None on the others).

    Resumes from the newest sound checkpoint. Raises ValueError for a Run that does not fit its data, model or
    processes, and Stopped, after saving, when a stop was asked for. A non-finite loss ends the run with a record of
    status "diverged".
    """
    # --- processes -------------------------------------------------------------------------------------------------
    accelerator = _accelerator(run, workspace, pace)
    rows = _rows_of_this_process(run, accelerator, pace)

    # --- data ------------------------------------------------------------------------------------------------------
    store, records = open_store(run.data, workspace), load_records(workspace)
    marks = input_marks(run, records)
    batches = _batches(run, store, workspace)
    validation = store.sequences("validation", run.sequence_length)

    # --- model and optimizer ---------------------------------------------------------------------------------------
    model = build_model(
        run.model,
        vocab_size=store.vocab_size,
        max_positions=run.sequence_length,
        seed=run.init_seed,
        bos_token_id=store.meta["bos"],
        eos_token_id=store.meta["eos"],
    )
    start_from(run, model, workspace)
    average = WeightAverage(run, model)
    teacher = load_teacher(run, batches, store, workspace, records)
    noise = Noise(seed=run.order_seed, dropout=run.dropout, mask_inputs=run.mask_inputs)
    noise.attach(model)
    rise = round(run.warmup * run.steps)
    optimizer = build_optimizer(model, run.optimizer, steps=run.steps, warmup_steps=rise, decay=run.decay)
    objective, optimizer = accelerator.prepare(Objective(model, noise, teacher), optimizer)
    model = accelerator.unwrap_model(objective).model
    progress = _resume(run, workspace, accelerator, model, optimizer, average)

    # --- steps -----------------------------------------------------------------------------------------------------
    evaluate_at = {round(run.steps * (i + 1) / run.evaluations) for i in range(run.evaluations)}
    started, start_step, saved = time.monotonic(), progress.step, time.monotonic()
    clock, matrices = StepClock(accelerator.device), 0
    while progress.step < run.steps and not progress.diverged:
        step = progress.step
        factor = multiplier(step, run.steps, kind=run.schedule, warmup=run.warmup)
        wd = run.optimizer.wd * decay_multiplier(factor, kind=run.wd_schedule)
        for group in optimizer.param_groups:
            group["lr"] = run.optimizer.lr * factor
            group["weight_decay"] = wd * group["decay_scale"]
        batch, first_row = batches(step)[rows], step * run.batch_size + rows.start
        loss, norm = _step(run, accelerator, objective, optimizer, batch, first_row, pace.micro_batch, clock)
        progress.add(loss)
        progress.step = step + 1
        if step == start_step:
            matrices = matrices_treated(optimizer)
            log.info("%s: %s treats %d matrices as such", run.name, type(run.optimizer).__name__, matrices)
        average.update(model, progress.step)

        if progress.step % LOG_STEPS == 0 or progress.step == run.steps:
            train_loss = progress.mean_loss(accelerator)
            progress.diverged = not math.isfinite(train_loss)
            clock.read()
            speed = (progress.step - start_step) * run.batch_tokens / (time.monotonic() - started)
            _log(
                accelerator,
                workspace,
                run,
                progress.step,
                train_loss=train_loss,
                lr=run.optimizer.lr * factor,
                gradient_norm=float(norm),
                tokens_per_second=round(speed, 1),
            )
        if progress.step in evaluate_at and not progress.diverged:
            with average.in_place(model):
                loss_now = evaluate(model, validation, accelerator)
            progress.diverged = not math.isfinite(loss_now)
            progress.curve.append([progress.step, loss_now])
            _log(accelerator, workspace, run, progress.step, validation_loss=loss_now)

        reason = _agreed_stop(accelerator, progress.step)
        if progress.step < run.steps and (reason or time.monotonic() - saved > pace.checkpoint_seconds):
            _save(run, workspace, accelerator, model, optimizer, average, progress)
            saved = time.monotonic()
        if reason and progress.step < run.steps:
            _end(accelerator)
            raise Stopped(f"{run.name} at step {progress.step} of {run.steps}: {reason}")

    # --- record ----------------------------------------------------------------------------------------------------
    hours = (time.monotonic() - started) / 3600
    average.swap(model)
    test = store.sequences("test", run.sequence_length) if store.meta["tokens"]["test"] >= run.sequence_length else None
    test_loss = evaluate(model, test, accelerator) if test is not None and not progress.diverged else None
    _end(accelerator)
    if not accelerator.is_main_process:
        return None
    if not progress.diverged:
        _save_model(model, store, workspace.folder(run.name) / "model")
    shutil.rmtree(workspace.folder(run.name) / "checkpoints", ignore_errors=True)
    counts = parameter_counts(run.model, vocab_size=store.vocab_size)
    speed = (progress.step - start_step) * run.batch_tokens / max(hours * 3600, 1e-9)
    return Record(
        job=run,
        fingerprint=fingerprint(run),
        status="diverged" if progress.diverged else "done",
        results={
            **progress.results(),
            "test_loss": test_loss,
            "parameters": counts.total,
            "non_embedding": counts.non_embedding,
            "tokens": progress.step * run.batch_tokens,
            "spectral_norms": None if progress.diverged else spectral_norms(model),
        },
        inputs=marks,
        provenance={
            **provenance(),
            "world_size": accelerator.num_processes,
            "profile": pace.profile,
            "loss_backend": backend(accelerator.device),
            "matrices": matrices,
            "state_bytes": state_bytes(optimizer),
            "optimizer_share": clock.share,
            "resumed_at": start_step or None,
            "hours": round(hours, 5),
            "tokens_per_second": round(speed, 1),
            "mfu": utilisation(6 * counts.total * speed, devices=accelerator.num_processes),
        },
    )


def evaluate(model: Any, sequences: Tokens, accelerator: Accelerator | None = None) -> float:
    """Return the mean next-token loss in nats of (n, T) sequences; processes share the rows."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    mine = torch.from_numpy(sequences[rank::world])
    total = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for chunk in torch.split(mine, max(1, EVALUATION_TOKENS // sequences.shape[1])):
            with _autocast(accelerator):
                hidden, targets = next_token(model, chunk.to(device))
                total -= token_log_probs(hidden, model.lm_head.weight, targets).double().sum().cpu()
    model.train(was_training)
    if accelerator and world > 1:
        total = accelerator.reduce(total.to(device), "sum").cpu()
    return float(total) / float(len(sequences) * (sequences.shape[1] - 1))


# --- the parts of the loop, in the order of their use ---------------------------------------------------------------


@dataclass
class Progress:
    """Where a run stands: everything a checkpoint must carry besides tensors."""

    step: int
    curve: list[list[float]]
    train_loss: float | None = None
    diverged: bool = False
    _sum: Any = 0.0
    _count: int = 0

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a step (this process's share) without waiting for the device."""
        self._sum, self._count = self._sum + loss.detach(), self._count + 1

    def mean_loss(self, accelerator: Accelerator) -> float:
        """Return the mean training loss since the last call, over all processes."""
        if self._count:
            self.train_loss = self._total(accelerator) / self._count
            self._sum, self._count = 0.0, 0
        assert self.train_loss is not None
        return self.train_loss

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return what `Progress(**state)` needs to go on as if nothing had happened; the step is the checkpoint's."""
        total = self._total(accelerator)
        return {"curve": self.curve, "train_loss": self.train_loss, "_sum": total, "_count": self._count}

    def _total(self, accelerator: Accelerator) -> float:
        """Return the sum of the losses since the last log, the mean over processes."""
        if self._count and accelerator.num_processes > 1:
            return float(accelerator.reduce(self._sum, "mean"))
        return float(self._sum)

    def results(self) -> dict[str, Any]:
        """Return the results of a record: nats per token, steps; None where the run diverged."""
        losses = [loss for _, loss in self.curve if math.isfinite(loss)]
        finite = not self.diverged and bool(losses)
        return {
            "loss": losses[-1] if finite else None,
            "best_loss": min(losses) if losses else None,
            "train_loss": self.train_loss if finite else None,
            "curve": [point for point in self.curve if math.isfinite(point[1])],
            "steps": self.step,
        }


def _accelerator(run: Run, workspace: Workspace, pace: Pace) -> Accelerator:
    # One worker trains many runs; accelerate keeps the precision of the first one unless told to forget it.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # so that several processes without a device speak through gloo
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        log_with=list(pace.trackers) or None,
        project_dir=str(workspace.folder(run.name)),
    )
    if pace.trackers:
        accelerator.init_trackers("epochal", config={"run": run.name})
    return accelerator


def _rows_of_this_process(run: Run, accelerator: Accelerator, pace: Pace) -> slice:
    """Return which rows of the global batch this process takes; raises ValueError when they do not divide."""
    world = accelerator.num_processes
    if run.batch_size % world:
        fitting = [n for n in range(1, run.batch_size + 1) if run.batch_size % n == 0]
        raise ValueError(
            f"Run {run.name!r}: batch_size {run.batch_size} is not divisible by {world} processes; "
            f"use {', '.join(map(str, fitting))} processes or another batch_size."
        )
    share = run.batch_size // world
    if pace.micro_batch is not None and (pace.micro_batch < 1 or share % pace.micro_batch):
        raise ValueError(
            f"micro-batch {pace.micro_batch} does not divide the {share} sequences of each process; use a divisor."
        )
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def _batches(run: Run, store: TokenStore, workspace: Workspace) -> Batches:
    """Return the batch function of a Run."""
    real = store.training_stream(run)
    if run.distill is None:
        return Batches(real, None, 0.0, run.batch_size)
    tokens = np.load(workspace.folder(run.distill.samples) / "samples.npy", mmap_mode="r")
    sampled = sampled_stream(tokens, int(store.meta["bos"]), run)
    return Batches(real, sampled, run.distill.fraction, run.batch_size)


def _step(
    run: Run,
    accelerator: Accelerator,
    objective: Any,
    optimizer: Any,
    rows: Tokens,
    first_row: int,
    micro_batch: int | None,
    clock: StepClock,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over this process's rows; returns (loss, gradient norm before clipping).

    The loss is this process's sum over the mean number of targets per process: its mean over processes is the loss.
    """
    clock.mark()
    tokens = torch.from_numpy(rows).to(accelerator.device)
    parts = torch.split(tokens, micro_batch or len(tokens))
    targets = len(tokens) * (run.sequence_length - 1)
    loss = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts, start=1):
        if number < len(parts):
            with accelerator.no_sync(objective):
                part_loss = objective(part, first_row, targets)
                accelerator.backward(part_loss)
        else:
            part_loss = objective(part, first_row, targets)
            accelerator.backward(part_loss)
        loss += part_loss.detach()
        first_row += len(part)
    norm = accelerator.clip_grad_norm_(objective.parameters(), run.clip_norm)
    clock.mark()
    optimizer.step()
    clock.mark()
    optimizer.zero_grad()
    return loss, norm


def _autocast(accelerator: Accelerator | None) -> Any:
    enabled = accelerator is not None and accelerator.mixed_precision == "bf16"
    return torch.autocast(accelerator.device.type if accelerator else "cpu", torch.bfloat16, enabled=enabled)


def _agreed_stop(accelerator: Accelerator, step: int) -> str | None:
    """Return why to stop, the same on all processes; with several they confer every few steps."""
    reason = stop_reason()
    if accelerator.num_processes == 1:
        return reason
    if step % LOG_STEPS:
        return None
    asked = accelerator.reduce(torch.tensor(float(reason is not None), device=accelerator.device), "sum")
    return (reason or "another process was asked to stop") if float(asked) else None


def _resume(
    run: Run,
    workspace: Workspace,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    average: WeightAverage,
) -> Progress:
    """Return the progress of the newest sound checkpoint, or a fresh start; cuts metrics.jsonl to it."""
    folder = workspace.folder(run.name)
    state = load_checkpoint(folder / "checkpoints", model, optimizer, average.tensors, say=log.warning)
    progress = Progress(0, []) if state is None else Progress(**state)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        kept = [line for line in lines if _step_of(line) <= progress.step]
        metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    accelerator.wait_for_everyone()
    return progress


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed process may be half-written
        return math.inf


def _save(
    run: Run,
    workspace: Workspace,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    average: WeightAverage,
    progress: Progress,
) -> None:
    state, folder = progress.state(accelerator), workspace.folder(run.name) / "checkpoints"
    if accelerator.is_main_process:
        save_checkpoint(folder, progress.step, model, optimizer, state, average.tensors)
    accelerator.wait_for_everyone()


def _end(accelerator: Accelerator) -> None:
    """Close the trackers and wait for all. The process group stays: a worker may train another run in it."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()


def _log(accelerator: Accelerator, workspace: Workspace, run: Run, step: int, **values: float) -> None:
    """Append one line to metrics.jsonl and mirror it to the trackers."""
    if accelerator.is_main_process:
        with (workspace.folder(run.name) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "steps": run.steps, **values}) + "\n")
    accelerator.log(values, step=step)


def _save_model(model: Any, store: TokenStore, folder: Path) -> None:
    """Write a Hugging Face folder: weights, config, tokenizer; beside and renamed."""
    beside = folder.with_name(".model.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    for file in store.tokenizer_folder.iterdir():
        shutil.copy(file, beside / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
