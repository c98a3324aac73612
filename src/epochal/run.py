"""The vocabulary of recipes: Run, Ensemble, Samples, Targets. Frozen values, complete, checked without torch.

Everything that determines weights (or tokens drawn from weights) is a field here. How fast and where it runs is a preset;
what came out is a record. Jobs name their inputs; a name stands for one meaning, guarded by `fingerprint`.
"""

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from epochal import optimizer_config, regularizer_config
from epochal.config import find_config, model_path, read_json, read_toml, to_table
from epochal.optimizer_config import *  # noqa: F403  every optimizer is exported here too
from epochal.optimizer_config import Optimizer
from epochal.ranges import (
    Batch,
    Epochs,
    Evaluations,
    Items,
    Kept,
    LessThanAll,
    Named,
    OneOf,
    Positive,
    Range,
    Ranged,
    Repeats,
    Seed,
    SequenceTokens,
    Share,
    SomeShare,
    Temperature,
    Tokens,
    TokensOrNone,
)
from epochal.regularizer_config import *  # noqa: F403
from epochal.regularizer_config import Regularizer

__all__ = [
    "Anchor",
    "Ensemble",
    "Job",
    "Run",
    "Samples",
    "SequenceDistillation",
    "SoftTargetDistillation",
    "Targets",
    "config_hash",
    "fingerprint",
    "inputs",
]
__all__ += [*optimizer_config.__all__, *regularizer_config.__all__]

ORDERS = ("documents", "sequences", "fixed")
WD_SCHEDULES = ("constant", "antiphase")
PRECISIONS = ("fp32", "bf16")
RESIDUALS = ("float32", "bfloat16")
AVERAGES = ("logits", "probs")
SOUP = "parameters"
WEIGHT_AVERAGING = ("last", "ema", "swa")
MODES = ("online", "cached")
DRAWS = ("members", "average")

JobName = Annotated[str, Named()]
Strength = Annotated[float, Range(0.0, 1e6)]  # of a pull


@dataclass(frozen=True, kw_only=True)
class SequenceDistillation(Ranged):
    """Learn from sampled text: a share `fraction` of every stream of batches comes from the named Samples.

    Total steps = steps_per_epoch * epochs / (1 - fraction), so the real tokens are seen `epochs` times all the same. With a
    fraction of 1, which leaves no real text, `epochs` counts passes over as many sampled tokens as there are real ones.
    """

    samples: str  # name of the Samples
    fraction: SomeShare  # of the stream: sampled text


@dataclass(frozen=True, kw_only=True)
class SoftTargetDistillation(Ranged):
    """Learn from soft targets too: (1 - weight) CE + weight T^2 KL(teacher at T || student at T).

    "cached" targets need an order that keeps the cut of the sequences.
    """

    source: str  # A Run or an Ensemble, or the Targets computed once over the training text, at temperature 1.
    kd_weight: SomeShare = 0.5  # of the divergence, 1 minus that of the labels
    temperature: Temperature = 1.0  # T, of teacher and student
    # "online" runs the models of `source` on every batch of the student; "cached" reads Targets.
    mode: Annotated[str, OneOf(MODES)] = "online"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "cached" and self.temperature != 1:
            raise ValueError(f'temperature is {self.temperature}; cached targets have 1, so use that or mode "online".')


@dataclass(frozen=True, kw_only=True)
class Anchor(Ranged):
    """Pull the weights to those that the run starts from (`epochal.training.regularizers.anchor`)."""

    strength: Strength  # as of a decoupled weight decay; 0 is off, to the last bit
    # Each weight in proportion to its Fisher information on the text of the run named by `init_from`: EWC.
    fisher: bool = False


@dataclass(frozen=True, kw_only=True)
class Run(Ranged):
    """Everything that determines one model's weights."""

    name: JobName
    model: str  # a name from configs/models, or a path
    data: str  # a name from configs/data
    unique_tokens: Tokens  # D, the tokens of one epoch
    epochs: Epochs
    batch_size: Batch  # sequences in one optimizer step, over all processes
    sequence_length: SequenceTokens
    optimizer: Optimizer
    warmup: LessThanAll = 0.01  # share of all steps
    clip_norm: Positive = 1.0  # largest L2 norm of the gradient
    data_order: Annotated[str, OneOf(ORDERS)] = "documents"  # see `epochal.data.store.Stream`
    init_seed: Seed = 0  # draws the weights
    order_seed: Seed = 0  # orders the data and draws the noise
    precision: Annotated[str, OneOf(PRECISIONS)] = "bf16"
    num_evals: Evaluations = 20  # evenly spaced, the last one after the last step
    distill: SequenceDistillation | None = None  # sampled text mixed into the data
    # Moves the decay over the run (`epochal.training.schedule`).
    wd_schedule: Annotated[str, OneOf(WD_SCHEDULES)] = "constant"
    teach: SoftTargetDistillation | None = None  # soft targets next to the labels
    # The Run whose final weights this one begins with, or a model from elsewhere, with a slash in it: the path of
    # a folder, or a name on the Hugging Face hub; without it weights are drawn from `init_seed`.
    init_from: str | None = None
    # Tokens of D that are bought but not trained on: the weights of an ensemble's members can be learned on them.
    holdout_tokens: TokensOrNone = 0
    # "last" keeps the final weights; "ema" decays by a factor e per window; "swa" is the mean over the last window.
    weight_averaging: Annotated[str, OneOf(WEIGHT_AVERAGING)] = "last"
    averaging_window: SomeShare = 0.1  # of the run
    dropout: LessThanAll = 0.0  # this and the next: see `epochal.training.noise`
    input_mask_prob: LessThanAll = 0.0
    # Precision of the stream that layers add to: "bfloat16" halves its memory and traffic, and rounds after every layer.
    residual: Annotated[str, OneOf(RESIDUALS)] = "float32"
    regularizer: Regularizer | None = None
    # Against forgetting of what the run named by `init_from` has learned.
    anchor: Anchor | None = None
    replay: LessThanAll = 0.0  # share of every stream of batches that is the text of that run, mixed in as samples are

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual == "bfloat16" and self.precision != "bf16":
            raise ValueError(f'residual "bfloat16" needs precision "bf16", got {self.precision!r}; change one of them.')
        if self.unique_tokens % self.batch_tokens:
            # Whole steps per epoch: otherwise an epoch would end within a batch.
            low = max(1, self.unique_tokens // self.batch_tokens) * self.batch_tokens
            raise ValueError(
                f"unique_tokens {self.unique_tokens} must be a multiple of the batch of {self.batch_size} x "
                f"{self.sequence_length} tokens; use {low} or {low + self.batch_tokens}."
            )
        if self.holdout_tokens % self.batch_tokens or self.holdout_tokens >= self.unique_tokens:
            raise ValueError(
                f"holdout_tokens is {self.holdout_tokens}; give a multiple of the batch of {self.batch_tokens} tokens "
                f"below unique_tokens {self.unique_tokens}."
            )
        self._check_teacher()
        self._check_regularizer()
        self._check_forgetting()

    def _check_teacher(self) -> None:
        if self.teach is None or self.teach.mode == "online":
            return
        if self.data_order == "documents":
            raise ValueError(
                'data_order is "documents", which packs the text differently in each epoch, but cached targets belong to fixed '
                'sequences; use order "sequences" or "fixed", or teach with mode "online".'
            )
        if self.distill is not None:
            raise ValueError(
                f"distill mixes in {self.distill.samples!r}, for which there are no cached targets; "
                'teach with mode "online" or leave out distill.'
            )

    def _check_regularizer(self) -> None:
        if self.regularizer is None:
            return
        kind = type(self.regularizer).__name__
        if self.regularizer.per_position and (
            self.data_order == "documents" or self.distill is not None or self.replay
        ):
            raise ValueError(
                f'regularizer {kind} keeps predictions for fixed sequences, which data_order "documents", distill and replay '
                'do not have; use data_order "sequences" or "fixed", and leave out distill and replay.'
            )
        if self.regularizer.has_loss and self.teach is not None:
            raise ValueError(f"regularizer {kind} has a loss that teach would replace; leave out one of them.")
        if kind == "StableMax" and self.input_mask_prob:
            raise ValueError("regularizer StableMax has no loss on masked inputs; leave out input_mask_prob.")
        if isinstance(self.regularizer, regularizer_config.SelfTuned):
            decays = isinstance(self.regularizer, regularizer_config.SelfTunedDecay)
            moved = "optimizer.wd" if decays else "dropout"
            if not self.holdout_tokens or not (self.optimizer.wd if decays else self.dropout):
                raise ValueError(
                    f"regularizer {kind} moves a {moved} above 0 by held-out text; set {moved} and holdout_tokens."
                )
            if not decays and self.dropout > regularizer_config.SelfTunedDropout.highest:
                raise ValueError(
                    f"regularizer {kind} keeps dropout at most {regularizer_config.SelfTunedDropout.highest}, got {self.dropout}."
                )
            if self.teach is not None:
                raise ValueError(
                    f"regularizer {kind} reads held-out text, for which there is no teacher; leave out teach."
                )
        if isinstance(self.regularizer, regularizer_config.LookAhead) and self.batch_size % 2:
            raise ValueError(
                f"regularizer {kind} needs batches of two halves, got batch_size {self.batch_size}; use an even one."
            )

    def _check_forgetting(self) -> None:
        if self.anchor is not None and self.init_from is None:
            raise ValueError(
                "anchor pulls the weights to those of init_from, which is not set; name a Run or a model folder."
            )
        old_text = (
            "replay" if self.replay else "anchor.fisher" if self.anchor is not None and self.anchor.fisher else ""
        )
        if old_text and (self.init_from is None or "/" in self.init_from):
            raise ValueError(
                f"{old_text} needs the text that a Run was trained on, and init_from is {self.init_from!r}; name a Run there."
            )
        if self.replay and self.distill is not None:
            raise ValueError("replay and distill both mix text into the batches; leave out one of them.")
        if self.replay and self.teach is not None and self.teach.mode == "cached":
            raise ValueError('replay mixes in text for which there are no cached targets; teach with mode "online".')

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.sequence_length

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show the real tokens once, those held out apart."""
        return (self.unique_tokens - self.holdout_tokens) // self.batch_tokens

    @property
    def steps(self) -> int:
        """All steps of the run, those on sampled or replayed text included (spec section 9: divided by 1 - w)."""
        share = 1.0 - (self.distill.fraction if self.distill else self.replay)
        # The real tokens are seen `epochs` times whatever share of the batches is sampled; where all of it is, there is
        # nothing to divide by, and epochs count as many sampled tokens as there are real ones.
        return round(self.steps_per_epoch * self.epochs / (share or 1.0))

    @property
    def tokens(self) -> int:
        """All tokens trained on, repeats included."""
        return self.steps * self.batch_tokens

    @property
    def passes(self) -> float:
        """Forward and backward passes of a step, relative to plain training; those of an online teacher apart."""
        masked = 2.0 if self.input_mask_prob else 1.0  # masked inputs are a second pass over the same tokens
        return masked * (1.0 if self.regularizer is None or self.regularizer.off else self.regularizer.passes)

    @property
    def more_heads(self) -> int:
        """Passes through the head that plain training lacks, each after a linear map."""
        return 0 if self.regularizer is None or self.regularizer.off else self.regularizer.more_heads

    @property
    def tau(self) -> float:
        """Averaging window 1 / (lr * wd * steps_per_epoch) in epochs (spec section 3); inf without decay."""
        rate = self.optimizer.lr * self.optimizer.wd * self.steps_per_epoch
        return 1.0 / rate if rate else float("inf")


@dataclass(frozen=True, kw_only=True)
class Ensemble(Ranged):
    """Runs evaluated together: the mean of their logits, or of their probabilities.

    "parameters" is the mean of the members' weights, one model (a soup). An ensemble of one is how a single model answers
    tasks.
    """

    name: JobName
    runs: Annotated[tuple[str, ...], Items()]  # names of the members
    # No default: logits and probabilities have different limits. "parameters" is of use only where all members
    # started from the same weights (spec sections 10 and 11).
    average: Annotated[str, OneOf((*AVERAGES, SOUP))]
    member_weights: tuple[Share, ...] | None = None  # summing to one; None: equal
    data: str | None = None  # another data set, of the same tokenizer, on whose held-out text to judge them
    tasks: tuple[str, ...] = ()  # multiple-choice tasks that they answer as well (`epochal.evaluation.downstream`)
    sharpness: bool = False  # of each member on its training text too (`epochal.evaluation.sharpness`)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.member_weights is not None and (
            len(self.member_weights) != len(self.runs) or abs(sum(self.member_weights) - 1) > 1e-6
        ):
            raise ValueError(
                f"member_weights is {self.member_weights}; give one share for each of {len(self.runs)} runs, summing to 1."
            )


@dataclass(frozen=True, kw_only=True)
class Samples(Ranged):
    """Tokens drawn from a Run, or from an Ensemble (spec section 9).

    Unconditional: each text begins with the tokenizer's start token and ends at its end token or at `max_length` tokens. With
    `prompt_tokens` it begins with as many tokens of a document of the source's training text; shorter documents are left out.
    """

    name: JobName
    source: str  # name of a Run or an Ensemble
    tokens: Tokens  # in all
    max_length: SequenceTokens  # of one text
    seed: Seed = 0
    temperature: Temperature = 1.0
    # "members": from the members one by one, each in proportion to its weight (equal parts, as in the paper, where
    # the ensemble has none); "average": every token from the averaged distribution.
    draw: Annotated[str, OneOf(DRAWS)] = "members"
    prompt_tokens: TokensOrNone = 0
    continuations: Repeats = 1  # of each document
    # Whether the continuations of a document are one text, a megadoc (arXiv 2603.18534); otherwise each is one, and those of a
    # document are as far from each other as can be.
    joined: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt_tokens and (self.joined or self.continuations > 1):
            raise ValueError(
                "continuations and joined are of documents, and prompt_tokens is 0; give the tokens of a prompt."
            )
        if self.prompt_tokens >= self.max_length:
            raise ValueError(
                f"prompt_tokens {self.prompt_tokens} leaves nothing to draw in texts of {self.max_length} tokens; use fewer."
            )


@dataclass(frozen=True, kw_only=True)
class Targets(Ranged):
    """Soft next-token targets of a Run or an Ensemble, for students that read a cache.

    They cover the training text: the first `unique_tokens` training tokens, cut into sequences of `sequence_length`.
    Members are averaged, and `keep` tokens of each position stay: the most probable ones, and a sample that stands for
    the rest (`epochal.generation.soft_targets`).
    """

    name: JobName
    source: str  # name of a Run or an Ensemble
    unique_tokens: Tokens
    sequence_length: SequenceTokens
    keep: Kept = 64  # tokens kept at each position

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(self.sequence_length, 10**14).check(self.unique_tokens, "unique_tokens")

    def bytes(self, vocab_size: int | None) -> int:
        """Return the disk that they need at most: an id and a float16 for each kept token, nothing won by compression."""
        sequences, width = self.unique_tokens // self.sequence_length, 2 if (vocab_size or 2**32) <= 2**16 else 4
        block = (self.sequence_length - 1) * min(self.keep, vocab_size or self.keep) * (width + 2)
        return sequences * (block + block // 1000 + 500)  # headers of two arrays, checksum index


Job = Run | Ensemble | Samples | Targets


def inputs(job: Job) -> tuple[str, ...]:
    """Return the names of the jobs whose outputs this one reads directly."""
    match job:
        case Run():
            source = None if job.init_from is None or "/" in job.init_from else job.init_from
            names = (source, job.distill and job.distill.samples, job.teach and job.teach.source)
            return tuple(name for name in names if name)
        case Ensemble():
            return job.runs
        case Samples() | Targets():
            return (job.source,)


def without_seed(name: str) -> str:
    """Return the name of a Run without the seed at its end: what the names of its ensembles start with."""
    return re.sub(r"-s\d+$", "", name)


def fingerprint(job: Job) -> str:
    """Hash what the job means: its non-default fields without the name, and the model and data files it names.

    A new field whose default keeps the behavior changes no fingerprint.
    """
    meaning = {"kind": type(job).__name__, **_non_defaults(job)}
    meaning.pop("name")
    meaning |= {kind: config_hash(path) for kind, path in config_files(job).items()}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


def config_files(job: Job) -> dict[str, Path]:
    """Return the files that a job names: its "model", its "data"."""
    files = {}
    if isinstance(job, Run):
        files["model"] = _config_path("models", job.model, Path.cwd())
    if isinstance(job, Run | Ensemble) and job.data is not None:
        files["data"] = _config_path("data", job.data, Path.cwd())
    return files


@functools.cache
def _config_path(kind: str, name: str, folder: Path) -> Path:
    """Find a file that a job names, seen from a working folder; a plan of 1,000 jobs asks for few, again and again."""
    return model_path(name) if kind == "models" else find_config(kind, name, ".toml")


def _non_defaults(value: Any) -> dict[str, Any]:
    table = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item == field.default:
            continue
        if dataclasses.is_dataclass(item):
            table[field.name] = {"kind": type(item).__name__, **_non_defaults(item)}
        else:
            table[field.name] = to_table(item)
    return table


def config_hash(path: Path) -> str:
    """Return the hash of the values in a JSON or TOML config."""
    stat = path.stat()
    return _hash_config(path, stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.cache
def _hash_config(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    """Hash a config's values: comments and layout may change freely."""
    if path.suffix == ".json":
        try:
            table = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}.") from None
    else:
        table = read_toml(path)
        _settle_readers(table)
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _settle_readers(table: dict[str, Any]) -> None:
    """Write the reader of .json files into a data config that is hashed."""
    # "api" read every .json file before the key existed: it has the hash of a config without one, so that records stay
    # valid, and "records" has another.
    more = table.get("more")
    for source in [table.get("source"), *(more if isinstance(more, list) else ())]:
        if not isinstance(source, dict):
            continue
        reader, files = source.pop("reader", "records"), source.get("files")
        names = [source.get("file"), *(files if isinstance(files, list) else ())]
        older = any(".json" in str(name).replace(".jsonl", "") for name in names)
        if (reader == "api") != older:
            source["reader"] = reader


def averaging(job: Job) -> tuple[str, tuple[float, ...] | None]:
    """Return how a job averages its models, and their weights (None: equal).

    Raises ValueError for an average of weights: that is one model, which is nowhere saved.
    """
    if not isinstance(job, Ensemble):
        return "logits", None
    if job.average == SOUP:
        raise ValueError(f"{job.name!r} averages weights; teach with an ensemble of logits or probs, or with a member.")
    return job.average, job.member_weights
