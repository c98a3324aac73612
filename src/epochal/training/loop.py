"""The training loop: one Run in, one model folder and one record out.

b sequences of T tokens are one micro-batch of one process. The numbers of processes and micro-batches change a result by
rounding only.
"""

import functools
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from epochal.config import write_atomic
from epochal.data.store import Batches, Tokens, TokenStore, open_samples, open_store, sampled_stream
from epochal.distributed.first_step_check import ShardedUpdateCheck
from epochal.distributed.memory import USABLE, memory_problem
from epochal.distributed.presets import check_micro_batch, check_modes
from epochal.distributed.processes import Processes
from epochal.loss import backend, cross_entropy, token_log_probs
from epochal.meaning import describe, meaning_of, take_folder
from epochal.models.config import check_run, flops_per_token, head_parameters, parameter_counts, read_config
from epochal.models.folder import save_model, write_settings
from epochal.models.layers import apply_modes, eager, set_deterministic, use_bf16_residual
from epochal.models.llama import build_model, next_token, start_from
from epochal.optim.build import build_optimizer, optimizer_backend, spectral_norms
from epochal.optim.roles import head_weight
from epochal.provenance import code_hash, provenance, utilisation
from epochal.records import Record, Records, Workspace, input_fingerprints, load_records
from epochal.run import Run
from epochal.stopping import SAVE_SECONDS, Stopped, stop_reason
from epochal.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from epochal.training.noise import MASKED_WEIGHT, Noise
from epochal.training.regularizers.anchor import check_anchor, load_anchor, old_text
from epochal.training.regularizers.losses import RegularizedLoss, regularized_loss
from epochal.training.regularizers.tuned_dropout import self_tuned
from epochal.training.schedule import decay_multiplier, multiplier
from epochal.training.step import TrainingStep, gradient_pass
from epochal.training.teacher import Teacher, load_teacher
from epochal.training.timing import StepClock
from epochal.training.weight_average import WeightAverage

log = logging.getLogger(__name__)

# Steps between lines of metrics.jsonl, checks for a non-finite loss and, at most, polls of stop requests.
LOG_STEPS = 10

# Tokens of one forward pass of an evaluation.
EVALUATION_TOKENS = 2**14


@dataclass(frozen=True)
class RuntimeOptions:
    """Options that change the speed of a run and never its result."""

    micro_batch: int | None = None  # sequences in one forward pass of a process (None: its whole share of the batch)
    trackers: tuple[str, ...] = ()  # names of accelerate's trackers
    checkpoint_seconds: float = 300.0  # longest time between two checkpoints
    preset: str = "here"
    modes: tuple[str, ...] = ()  # execution modes, keys of `distributed.presets.MODES`
    rank_timeout: float = 1800.0  # seconds after which a process that does not answer ends the run


class ModelWithLoss(torch.nn.Module):
    """A causal language model that returns its loss."""

    # The loss is inside the wrapped module for three reasons: logits are never whole in memory, the backend sees every
    # forward pass, and no preset changes the precision, because autocast is inside too.

    def __init__(
        self, model: Any, noise: Noise, teacher: Teacher | None, precision: str, own: RegularizedLoss | None = None
    ) -> None:
        super().__init__()
        self.model, self.noise, self.teacher, self.precision, self.own = model, noise, teacher, precision, own

    def forward(self, tokens: torch.Tensor, first_row: int = 0, normaliser: float = 1.0) -> torch.Tensor:
        """Return the summed loss of (b, T) tokens over `normaliser`, 0-d.

        In training mode the run's loss with its noise and teacher, float32, of rows `first_row`, ... of the run; in
        evaluation mode the plain next-token loss, float64.
        """
        # One method for both modes, because DDP and DeepSpeed hook into `forward` only.
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if self.training:
                return self._training_loss(tokens, first_row, normaliser)
            hidden, targets = next_token(self.model, tokens)
            if self.own is not None and self.own.evaluates:
                return self.own.evaluate(hidden, head_weight(self.model), targets) / normaliser
            return -token_log_probs(hidden, head_weight(self.model), targets).double().sum() / normaliser

    def _training_loss(self, tokens: torch.Tensor, first_row: int, normaliser: float) -> torch.Tensor:
        rows, head = range(first_row, first_row + len(tokens)), head_weight(self.model)
        self.noise.begin(rows)
        hidden, _ = next_token(self.model, self.noise.replaced(tokens, rows))
        targets, source = tokens[:, 1:].flatten(), self.own or self.teacher
        if source is None:
            loss = cross_entropy(hidden, head, targets, normaliser=normaliser)
        else:
            loss = source.loss(hidden, head, targets, tokens, rows, normaliser)
        # A second pass over the same rows with some input embeddings hidden; its loss is added with a small weight.
        if self.noise.masking:
            self.noise.begin(rows, "masked")
            masked = self.noise.hide(self.model.get_input_embeddings()(tokens), rows)
            hidden, targets = next_token(self.model, tokens, masked)
            loss = loss + MASKED_WEIGHT * cross_entropy(hidden, head, targets, normaliser=normaliser)
        return loss


def train(run: Run, workspace: Workspace, options: RuntimeOptions = RuntimeOptions()) -> Record | None:
    """Train one Run to its end and return its record.

    Only the main process gets a record, the others None. Resumes from the newest intact checkpoint. Raises ValueError
    for a Run that does not fit its data, model or processes, and Stopped, after saving, when a stop was requested. A
    non-finite loss ends the run with a record of status "diverged".
    """
    # --- processes -------------------------------------------------------------------------------------------------
    check_run(run)
    processes = _processes(run, workspace, options)
    rows = _rows_of_this_process(run, processes, options)

    # --- data ------------------------------------------------------------------------------------------------------
    store, records = open_store(run.data, workspace), load_records(workspace)
    # Taken before training: this is what was read, whatever happens to files and records meanwhile.
    marks, config = input_fingerprints(run, records), read_config(run.model)
    meaning = _meaning(run, workspace, records, processes)
    _check_memory(run, processes, options, store.vocab_size)
    batches = _batches(run, store, workspace)
    validation = store.sequences("validation", run.sequence_length)

    # --- model and optimizer ---------------------------------------------------------------------------------------
    # Deferred because it is called twice: sharded weights are gathered into a second model at the end.
    build = functools.partial(
        build_model,
        config,
        vocab_size=store.vocab_size,
        max_positions=run.sequence_length,
        seed=run.init_seed,
        bos_token_id=store.meta["bos"],
        eos_token_id=store.meta["eos"],
    )
    model, checkpoint = build(), _checkpoint(run, workspace, processes, meaning)
    if checkpoint is None:
        start_from(run, model, workspace, store.tokenizer_folder)
    else:
        checkpoint.load_weights(model)
    teacher = load_teacher(run, batches, store, workspace, records)
    # Noise depends on the seed and the row number, not on a global generator: a resume or another split of the
    # batch draws the same.
    noise = Noise(
        seed=run.order_seed, dropout=run.dropout, input_mask_prob=run.input_mask_prob, regularizer=run.regularizer
    )
    noise.attach(model)
    if run.residual == "bfloat16":
        use_bf16_residual(model)
    # How fast the model computes, never what: see `distributed.presets.MODES`.
    apply_modes(model, processes.modes, processes.device, noise.recomputing)
    warmup_steps = round(run.warmup * run.steps)
    # Deferred too: the check of the first step builds a second optimizer, as one process alone would.
    make_optimizer = functools.partial(
        build_optimizer, choice=run.optimizer, steps=run.steps, warmup_steps=warmup_steps
    )
    own = regularized_loss(run, batches.real, model.config, processes.device)
    processes.prepare(ModelWithLoss(model, noise, teacher, run.precision, own), make_optimizer, run.precision)
    anchor, tuned = load_anchor(run, build, model, store, workspace, records), self_tuned(run, store, noise)
    # What a checkpoint holds of the regularizer.
    regularizer_state = own.tensors if own is not None else tuned.tensors if tuned is not None else {}
    # After `prepare`, so that the average is on the device of the weights.
    average = WeightAverage(run, model)
    settings = functools.partial(write_settings, model.config, store.tokenizer_folder)
    # Weights were loaded before `prepare` sharded them; optimizer state can only be loaded after it.
    progress, resumed_code = _resume(run, workspace, processes, checkpoint, average, regularizer_state)
    _start_trackers(run, processes, options, meaning, progress.step)

    # --- steps -----------------------------------------------------------------------------------------------------
    # `num_evals` evenly spaced steps, the last of which is the last step.
    evaluate_at = {round(run.steps * (i + 1) / run.num_evals) for i in range(run.num_evals)} - {0}
    started, start_step = time.monotonic(), progress.step
    clock, check = StepClock(processes.device), ShardedUpdateCheck(processes, run.name)
    stopper = Stopper(processes, options.checkpoint_seconds)
    training_step = TrainingStep(
        run, processes, gradient_pass(processes, model), options.micro_batch, clock, check, anchor, tuned, own
    )
    save = functools.partial(_save, run, workspace, processes, average, progress, meaning, settings, regularizer_state)
    evaluate_if_due = functools.partial(
        _evaluate_if_due, run, workspace, processes, average, progress, model, validation, stopper, evaluate_at
    )
    # A run that was stopped in an evaluation begins with it.
    evaluate_if_due()
    _leave_evaluation(run, processes, progress, stopper, save)
    if processes.rebuilds_buckets and progress.step < run.steps:
        training_step.settle_buckets(batches(start_step)[rows], rows.start)
    while progress.step < run.steps and not progress.diverged:
        step = progress.step

        # Schedule: lr and weight decay of this step, for the parts of the model that decay.
        factor = multiplier(step, run.steps, warmup=run.warmup)
        wd = run.optimizer.wd * decay_multiplier(factor, kind=run.wd_schedule)
        wd *= 1.0 if tuned is None else tuned.decay_factor
        for group in processes.optimizer.param_groups:
            group["lr"] = run.optimizer.lr * factor
            group["weight_decay"] = wd * group["decay_scale"]

        # Forward, backward and optimizer step. Rows are numbered over the whole run: each has its own noise.
        batch, first_row = batches(step)[rows], step * run.batch_size + rows.start
        loss, norm = training_step(step, batch, first_row, factor)
        progress.add(loss)
        progress.step = step + 1
        average.update(model, progress.step)

        # Log. Reading the loss waits for the device, so it is read every LOG_STEPS steps only.
        if progress.step % LOG_STEPS == 0 or progress.step == run.steps:
            train_loss = progress.mean_loss(processes)
            progress.diverged = not math.isfinite(train_loss)
            # Reading the loss has just waited for the device, so reading its timers costs nothing.
            clock.read()
            speed = (progress.step - start_step) * run.batch_tokens / (time.monotonic() - started)
            _log(
                processes,
                workspace,
                run,
                progress.step,
                train_loss=train_loss,
                lr=run.optimizer.lr * factor,
                gradient_norm=float(norm),
                tokens_per_second=round(speed, 1),
            )

        # Evaluate, with averaged weights where the run averages them.
        evaluate_if_due()

        # Save and stop. After the last step and its evaluation there is nothing to resume.
        reason, due = stopper.poll()
        unfinished = progress.step < run.steps or stopper.in_evaluation
        if unfinished and due:
            save()
            stopper.saved()
        if unfinished and reason:
            _stop(run, processes, progress, reason)

    # --- record ----------------------------------------------------------------------------------------------------
    # Before the test evaluation: hours and speed describe training.
    hours = (time.monotonic() - started) / 3600
    with average.in_place(model):
        test_loss = _test_loss(run, store, processes, progress, stopper)
    _leave_evaluation(run, processes, progress, stopper, save)
    # For good: the saved model has the averaged weights.
    average.swap(model)
    state_bytes = processes.optimizer.state_bytes()
    final = processes.whole_model(build)
    # All processes took part in gathering the model; only the main one saves it.
    processes.end()
    if final is None:
        return None
    if not progress.diverged:
        save_model(final, store.tokenizer_folder, workspace.folder(run.name) / "model")
    counts = parameter_counts(config, vocab_size=store.vocab_size)
    flops = run.passes * flops_per_token(config, run.sequence_length, vocab_size=store.vocab_size)
    flops += 6.0 * run.more_heads * head_parameters(config, vocab_size=store.vocab_size)
    speed = (progress.step - start_step) * run.batch_tokens / max(hours * 3600, 1e-9)
    return Record(
        job=run,
        fingerprint=meaning["fingerprint"],
        status="diverged" if progress.diverged else "done",
        results={
            **progress.results(),
            "test_loss": test_loss,
            "parameters": counts.total,
            "non_embedding": counts.non_embedding,
            "tokens": progress.step * run.batch_tokens,
            "text": store.text(run.unique_tokens),
            "spectral_norms": None if progress.diverged else spectral_norms(final),
            **({} if tuned is None else tuned.results),
        },
        inputs=marks,
        provenance={
            **provenance(),
            "code": code_hash(),
            "world_size": processes.world,
            "preset": options.preset,
            "modes": list(processes.modes),
            "loss_backend": backend(processes.device),
            "optimizer_backend": optimizer_backend(run.optimizer, processes.device),
            "sharding": processes.backend,
            "matrices": len(processes.optimizer.matrices),
            "update_error": check.error,
            "state_bytes": state_bytes,
            "optimizer_share": clock.share,
            # A resumed run: hours and speed cover the last session only.
            "resumed_at": start_step or None,
            # Of the code that wrote the checkpoint, if it was another than this one's `code`.
            "resumed_from_code": resumed_code,
            "hours": round(hours, 5),
            "tokens_per_second": round(speed, 1),
            "mfu": utilisation(flops * speed, devices=processes.world),
        },
    )


def evaluate(processes: Processes, sequences: Tokens, stopper: "Stopper") -> float | None:
    """Return the mean next-token loss of (n, T) sequences, in nats; None if a stop was requested before the end.

    Every sequence is evaluated by one of the processes.
    """
    stopper.poll_next()  # a batch here may take much longer than a step
    share = -(-len(sequences) // processes.world)
    size = max(1, EVALUATION_TOKENS // sequences.shape[1])
    # float64, so that the mean does not depend on how sequences are split over processes.
    total = torch.zeros((), dtype=torch.float64)
    processes.wrapped.eval()
    # Never compiled: another shape would be another graph, and evaluations are the same function under every preset.
    with torch.no_grad(), eager(processes.modes):
        for first in range(0, share, size):
            if first and stopper.poll()[0]:
                processes.wrapped.train()
                stopper.in_evaluation = True
                return None
            # Interleaved: sequence i goes to process i mod world, so shares differ by at most one sequence.
            wanted = np.arange(first, min(share, first + size)) * processes.world + processes.rank
            inside = wanted[wanted < len(sequences)]
            # A sharded model is gathered in every forward pass, so all processes need the same number of passes: one
            # without rows evaluates any row and does not count it.
            rows = torch.from_numpy(sequences[inside if len(inside) else wanted[:1] * 0])
            loss = processes.wrapped(rows.to(processes.device))
            total += loss.cpu() if len(inside) else 0.0
    processes.wrapped.train()
    # A sequence of T tokens has T - 1 targets.
    return float(processes.sum(total)) / float(len(sequences) * (sequences.shape[1] - 1))


# --- the parts of the loop, in order of use -------------------------------------------------------------------------


@dataclass
class Progress:
    """The state of a run that a checkpoint must hold besides tensors."""

    step: int
    curve: list[list[float]]
    train_loss: float | None = None
    diverged: bool = False
    # Sum and number of the losses since the last log; a tensor on the device, which is read only when a line is
    # logged.
    _sum: Any = 0.0
    _count: int = 0

    def add(self, loss: torch.Tensor) -> None:
        """Add this process's loss of a step, without waiting for the device."""
        self._sum, self._count = self._sum + loss.detach(), self._count + 1

    def mean_loss(self, processes: Processes) -> float:
        """Return the mean training loss since the last call, over all processes."""
        if self._count:
            self.train_loss = float(processes.sum(self._sum)) / processes.world / self._count
            self._sum, self._count = 0.0, 0
        assert self.train_loss is not None
        return self.train_loss

    def state(self, processes: Processes) -> dict[str, Any]:
        """Return the arguments that restore this object, except the step, which the checkpoint adds."""
        sums = processes.gather(float(self._sum))
        return {"curve": self.curve, "train_loss": self.train_loss, "_sum": sums, "_count": self._count}

    def results(self) -> dict[str, Any]:
        """Return the results of a record in nats per token; None for a loss of a diverged run."""
        losses = [loss for _, loss in self.curve if math.isfinite(loss)]
        finite = not self.diverged and bool(losses)
        return {
            "loss": losses[-1] if finite else None,
            "best_loss": min(losses) if losses else None,
            "train_loss": self.train_loss if finite else None,
            "curve": [point for point in self.curve if math.isfinite(point[1])],
            "steps": self.step,
        }


def own_sum(sums: list[float] | float, rank: int, world: int) -> float:
    """Return the sum that a process continues, from those in a checkpoint."""
    if isinstance(sums, float):
        return sums  # a checkpoint from before the sums of all processes were kept has their mean
    # Its own where their number is the same: a mean would change the last bit of the logged loss.
    return sums[rank] if len(sums) == world else math.fsum(sums) / len(sums)


def _processes(run: Run, workspace: Workspace, options: RuntimeOptions) -> Processes:
    processes = Processes(
        clip_norm=run.clip_norm,
        micro_batch=options.micro_batch or 1,
        trackers=options.trackers,
        folder=workspace.folder(run.name),
        modes=options.modes,
        timeout=options.rank_timeout,
    )
    check_modes(processes.preset, run, world=processes.world, device=processes.device.type)
    set_deterministic("deterministic" in processes.modes)
    # The average is a sum of whole weights; a shard has only a part of them.
    if run.weight_averaging != "last" and processes.backend in ("zero3", "fsdp2"):
        raise ValueError(
            f"Run {run.name!r} averages its weights, which {processes.backend} shards; use ddp, zero1 or zero2."
        )
    if processes.device.type == "cuda" and backend(processes.device) == "torch":
        log.warning("%s: Triton is not installed, so losses and optimizers use plain torch, which is slower", run.name)
    check_anchor(run, processes.backend, processes.world)
    return processes


def _rows_of_this_process(run: Run, processes: Processes, options: RuntimeOptions) -> slice:
    """Return the rows of the global batch that this process trains on; raises ValueError if they do not divide."""
    world = processes.world
    if run.batch_size % world:
        # The error lists every number of processes that works.
        fitting = [n for n in range(1, run.batch_size + 1) if run.batch_size % n == 0]
        raise ValueError(
            f"Run {run.name!r}: batch_size {run.batch_size} is not divisible by {world} processes; "
            f"use {', '.join(map(str, fitting))} processes or another batch_size."
        )
    share = run.batch_size // world
    check_micro_batch(options.micro_batch, share)
    return slice(processes.rank * share, (processes.rank + 1) * share)


def _check_memory(run: Run, processes: Processes, options: RuntimeOptions, vocab_size: int) -> None:
    """Raise ValueError for a run larger than its devices; warn where it is close."""
    if processes.device.type != "cuda":
        return
    size = float(torch.cuda.get_device_properties(processes.device).total_memory)
    problem = functools.partial(
        memory_problem, run, options.micro_batch, world=processes.world, preset=processes.preset, vocab_size=vocab_size
    )
    # An estimate: refuse only what exceeds the device even if all of it could be used.
    if certain := problem(size / USABLE):
        raise ValueError(certain)
    if possible := problem(size):
        log.warning("%s", possible)


def _batches(run: Run, store: TokenStore, workspace: Workspace) -> Batches:
    real = store.training_stream(run)
    if run.replay:
        return Batches(real, old_text(run, store, workspace, load_records(workspace)), run.replay, run.batch_size)
    if run.distill is None:
        return Batches(real, None, 0.0, run.batch_size)
    record = load_records(workspace).named(run.distill.samples)
    made_with = None if record is None else record.results.get("vocabulary")  # older records lack it
    if made_with is not None and made_with != store.vocabulary:
        raise ValueError(
            f"Run {run.name!r} cannot learn from {run.distill.samples!r}: its text was sampled with another vocabulary than "
            f"that of {store.folder}; sample from a model with the same tokenizer."
        )
    tokens = open_samples(workspace.folder(run.distill.samples) / "samples.npy", store)
    sampled = sampled_stream(tokens, int(store.meta["bos"]), run)
    return Batches(real, sampled, run.distill.fraction, run.batch_size)


def _evaluate_if_due(
    run: Run,
    workspace: Workspace,
    processes: Processes,
    average: WeightAverage,
    progress: Progress,
    model: torch.nn.Module,
    validation: Tokens,
    stopper: "Stopper",
    evaluate_at: set[int],
) -> None:
    """Add the point of this step to the curve, where one is missing."""
    if progress.step not in evaluate_at or progress.diverged or progress.step in [step for step, _ in progress.curve]:
        return
    with average.in_place(model):
        loss = evaluate(processes, validation, stopper)
    if loss is None:
        return
    # A run may diverge between two logged training losses.
    progress.diverged = not math.isfinite(loss)
    progress.curve.append([progress.step, loss])
    _log(processes, workspace, run, progress.step, validation_loss=loss)


def _test_loss(
    run: Run, store: TokenStore, processes: Processes, progress: Progress, stopper: "Stopper"
) -> float | None:
    # Small corpora may have no test split.
    if store.meta["tokens"]["test"] < run.sequence_length or progress.diverged:
        return None
    return evaluate(processes, store.sequences("test", run.sequence_length), stopper)


def _leave_evaluation(
    run: Run, processes: Processes, progress: Progress, stopper: "Stopper", save: Callable[[], None]
) -> None:
    """Save and stop if an evaluation was stopped."""
    if stopper.in_evaluation:
        save()
        _stop(run, processes, progress, stopper.reason)


def _stop(run: Run, processes: Processes, progress: Progress, reason: str | None) -> NoReturn:
    processes.end()
    raise Stopped(f"{run.name} at step {progress.step} of {run.steps}: {reason}")


class Stopper:
    """Decides when to stop and when to save, with the same answer on all processes."""

    # All ranks must agree, since saving is a collective: a rank that decided alone would block in it. Several ranks
    # therefore synchronize, about every second and at least every LOG_STEPS steps or batches of an evaluation.

    def __init__(self, processes: Processes, checkpoint_seconds: float) -> None:
        self.processes, self.checkpoint_seconds = processes, checkpoint_seconds
        self.reason: str | None = None  # why to stop, once all processes have it
        self.in_evaluation = False  # whether an evaluation has been stopped
        self._last_save = self._last_poll = time.monotonic()
        self._calls = self._last_call = self._next_call = 0

    def poll_next(self) -> None:
        """Synchronize at the next call, whatever the last ones took."""
        self._last_poll, self._last_call, self._next_call = time.monotonic(), self._calls, 0

    def saved(self) -> None:
        """Record that a checkpoint was written now."""
        self._last_save = time.monotonic()

    def poll(self) -> tuple[str | None, bool]:
        """Return why to stop after this step or batch, or None, and whether to save; all processes call it equally often."""
        self._calls += 1
        if self.reason is not None:
            return self.reason, True
        reason, due = stop_reason(), time.monotonic() - self._last_save > self.checkpoint_seconds
        if self.processes.world == 1:
            self.reason = reason
            return reason, due or reason is not None
        if self._calls < self._next_call:
            return None, False
        # The slowest rank sets the next poll, so all ranks compute the same step number without another exchange.
        step_seconds = (time.monotonic() - self._last_poll) / max(1, self._calls - self._last_call)
        answers = self.processes.gather((reason, due, step_seconds))
        slowest = max(seconds for _, _, seconds in answers)
        self._next_call = self._calls + max(1, min(LOG_STEPS, int(1.0 / max(slowest, 1e-9))))
        self._last_call, self._last_poll = self._calls, time.monotonic()
        reasons = [other for other, _, _ in answers if other]
        # One reason is enough: a signal may reach one rank only, and all must leave together.
        if reasons:
            self.reason = reason or f"another process was asked to stop ({reasons[0]})"
            return self.reason, True
        return None, any(other_due for _, other_due, _ in answers)


def _meaning(run: Run, workspace: Workspace, records: Records, processes: Processes) -> dict[str, Any]:
    """Take the run's folder, and return the meaning that all processes agree on."""
    if processes.is_main:
        take_folder(run, workspace, records)
    meanings = processes.gather(meaning_of(run, workspace, records))
    for rank, other in enumerate(meanings):
        if other != meanings[0]:
            raise ValueError(
                f"Run {run.name!r} has other inputs on rank {rank} than on rank 0 ({describe(other, meanings[0])}); give all "
                "machines the same files."
            )
    first: dict[str, Any] = meanings[0]
    return first


def _checkpoint(run: Run, workspace: Workspace, processes: Processes, meaning: dict[str, Any]) -> Checkpoint | None:
    folder = workspace.folder(run.name) / "checkpoints"
    newest = newest_checkpoint(folder, meaning, warn=log.warning) if processes.is_main else None
    path = processes.gather(newest)[0]  # the main process chooses for all
    return None if path is None else Checkpoint(path)


def _resume(
    run: Run,
    workspace: Workspace,
    processes: Processes,
    checkpoint: Checkpoint | None,
    average: WeightAverage,
    regularizer_state: dict[str, torch.Tensor],
) -> tuple[Progress, str | None]:
    """Load all of a checkpoint but the weights, and truncate metrics.jsonl to its step.

    Without a checkpoint the run starts at step 0. Also returns the hash of the code that wrote it, if it was another.
    """
    folder, progress, code = workspace.folder(run.name), Progress(0, []), code_hash()
    if checkpoint is not None:
        processes.optimizer.load_named_state(checkpoint)
        state = {key: value for key, value in checkpoint.state.items() if key not in ("meaning", "code")}
        state["_sum"] = own_sum(state["_sum"], processes.rank, processes.world)
        progress, code = Progress(**state), checkpoint.state["code"]
        checkpoint.load_average(average.tensors)
        checkpoint.load_regularizer(regularizer_state)
    if code != code_hash() and processes.is_main:
        log.warning(
            "%s: %s was written by another version of epochal; resuming it", run.name, checkpoint and checkpoint.path
        )
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        # The steps after the checkpoint are trained and logged again.
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        kept = [line for line in lines if _step_of(line) <= progress.step]
        write_atomic(metrics, "".join(f"{line}\n" for line in kept))
    processes.wait()
    return progress, code if code != code_hash() else None


def _start_trackers(
    run: Run, processes: Processes, options: RuntimeOptions, meaning: dict[str, Any], step: int
) -> None:
    """Open the run's page in each tracker: a resumed run is the same page, without the steps after its checkpoint."""
    if not options.trackers:
        return
    # The fingerprint, so that a run of another meaning is another page. wandb itself ignores steps that it has seen, and
    # they were equal; TensorBoard draws them twice unless they are purged.
    page = f"{run.name}-{meaning['fingerprint']}"
    settings = {
        "tensorboard": {"purge_step": step + 1 if step else None},
        "wandb": {"name": run.name, "id": page[-64:], "resume": "allow"},
        "trackio": {"name": page, "resume": "allow"},
    }
    chosen = {name: settings[name] for name in options.trackers if name in settings}
    processes.accelerator.init_trackers("epochal", config={"run": run.name}, init_kwargs=chosen)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # the last line of a killed process may be half-written
        return math.inf


def _save(
    run: Run,
    workspace: Workspace,
    processes: Processes,
    average: WeightAverage,
    progress: Progress,
    meaning: dict[str, Any],
    settings: Callable[[Path], None],
    regularizer_state: dict[str, torch.Tensor],
) -> None:
    started = time.monotonic()
    save_checkpoint(
        workspace.folder(run.name) / "checkpoints",
        progress.step,
        processes.weights_on_main(),
        processes.optimizer.named_state(),
        {**progress.state(processes), "meaning": meaning, "code": code_hash()},
        average.tensors,
        regularizer=regularizer_state,
        settings=settings,
        group=processes,
    )
    if processes.is_main:
        # A worker that is asked to stop waits for as long as a save takes.
        write_atomic(workspace.folder(run.name) / SAVE_SECONDS, f"{time.monotonic() - started:.3f}")


def _log(processes: Processes, workspace: Workspace, run: Run, step: int, **values: float) -> None:
    """Append one line to metrics.jsonl and send it to the trackers."""
    if processes.is_main:
        with (workspace.folder(run.name) / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "steps": run.steps, **values}) + "\n")
    processes.accelerator.log(values, step=step)
