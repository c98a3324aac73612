"""`epochal init`: read a text, measure this machine, and write a data config and a scale that fit a time.

The choices are those of `epochal.search.regime`; docs/regime.md explains them.
"""

import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from epochal.campaign.environment import usable_cores
from epochal.config import model_folder, write_atomic
from epochal.data.documents import Source, read_documents
from epochal.models.config import parameter_counts
from epochal.search.regime import (
    FEWEST_DOCUMENTS,
    LEARNING_RATES,
    STUDENT_EPOCHS,
    Choice,
    Shape,
    Text,
    cautions,
    choose,
    vocabulary,
)

# The models that are tried, smallest first.
CPU_MODELS = ("w16", "w32", "w64", "w96", "w128", "w192")
GPU_MODELS = ("w64", "w128", "w192", "gpu-25m", "gpu-50m", "ic-150m", "ic-300m", "ic-600m")
PIECE = 2000  # characters of a document where a text has neither files nor paragraphs
SPLIT, LARGEST_SPLIT = 0.05, 0.2  # share of documents held out, for each of validation and test
HELD_OUT = 32  # sequences, at about three bytes a token: a short text holds out a larger share to have so many
SEQUENCE_LENGTH = {"cpu": 128, "gpu": 512}
MEASURED_TOKENS = 1024  # of a batch whose training is timed


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for."""

    name: str
    files: tuple[str, ...]
    seconds: float
    device: str  # "cpu" or "gpu"
    work: Path
    start: str = ""  # a model to go on from: a folder, or a name on the Hugging Face hub


def init(request: Request, *, force: bool = False) -> list[str]:
    """Write configs/data/NAME.toml and configs/scales/NAME.toml; returns what to tell the user, by line.

    The token store is made too, because every choice depends on its size. Raises ValueError for a name in use, for text that
    cannot be read, and for a time that is too short. A failure leaves no config behind.
    """
    from epochal.data.prepare import prepare

    if request.start:
        folder = str(model_folder(request.start))
        request = replace(request, start=folder if "/" in folder else f"./{folder}")  # a name is that of a config
    data, scale = (Path("configs") / kind / f"{request.name}.toml" for kind in ("data", "scales"))
    for path in (data, scale):
        if path.exists() and not force:
            raise ValueError(f"{path} exists; choose another name, or replace it with --force.")
    size, documents = _measure_text(request)
    with _removed_after_a_failure(data):
        write_atomic(data, _data_toml(request, size, documents))
        store = prepare(request.name, request.work / "data")
        _check_held_out(request, store.meta["tokens"])
        text = Text(documents=store.meta["documents"]["train"], tokens=store.meta["tokens"]["train"], bytes=size)
        choice, speeds = _choose(request, text, store.vocab_size)
        write_atomic(scale, _scale_toml(request, text, choice, speeds))
    return _summary(request, text, store.vocab_size, choice, documents)


def _check_held_out(request: Request, tokens: dict[str, int]) -> None:
    """Refuse a text that leaves no sequence to evaluate on."""
    length = SEQUENCE_LENGTH[request.device]
    for split in ("validation", "test"):
        if tokens[split] < length:
            raise ValueError(
                f"the {split} split has {tokens[split]} tokens, and a sequence has {length}; give more text than "
                f"{', '.join(request.files)}."
            )


@contextmanager
def _removed_after_a_failure(path: Path) -> Iterator[None]:
    before = path.read_text(encoding="utf-8") if path.exists() else None
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        if before is not None:
            write_atomic(path, before)
        raise


@dataclass(frozen=True, kw_only=True)
class Documents:
    """What counts as a document of the text."""

    number: int  # of files and rows
    unit: str  # "files", "paragraphs" or "pieces"

    @property
    def sentence(self) -> str:
        """What the user reads of it; empty for files and rows."""
        have = f"The files hold {self.number} document{'s' * (self.number > 1)}"
        return {
            "files": "",
            "paragraphs": f"{have}, too few to hold some out: each paragraph is a document instead.",
            "pieces": f"{have} and fewer than {FEWEST_DOCUMENTS} paragraphs, too few to hold some out: pieces of at most "
            f"{PIECE:,} characters are documents instead.",
        }[self.unit]


def _measure_text(request: Request) -> tuple[int, Documents]:
    """Return the bytes of the text, and what its documents are."""
    size, number = _read(Source(files=request.files))
    if not number:
        raise ValueError(f"{', '.join(request.files)} has no text; give other files.")
    unit = "files"
    if number < FEWEST_DOCUMENTS:
        unit, most = "paragraphs", max(number, _read(Source(files=request.files, separator=""))[1])
        # Rows of tables are neither split nor cut; a text of a few paragraphs only has few of either.
        if most < FEWEST_DOCUMENTS and most < _read(Source(files=request.files, cut=PIECE))[1]:
            unit = "pieces"
    return size, Documents(number=number, unit=unit)


def _read(source: Source) -> tuple[int, int]:
    """Return the bytes and the number of documents of a source."""
    size = documents = 0
    for text in read_documents(source):
        size += len(text.encode("utf-8", "replace"))
        documents += bool(text.strip())
    return size, documents


def _choose(request: Request, text: Text, vocab_size: int) -> tuple[Choice, dict[int, dict[str, float]]]:
    """Return the campaign, and the speeds it was chosen by."""
    from epochal.training.speed import training_speeds

    models = (request.start,) if request.start else CPU_MODELS if request.device == "cpu" else GPU_MODELS
    length = SEQUENCE_LENGTH[request.device]
    sizes = {model: parameter_counts(model, vocab_size=vocab_size).total for model in models}
    cores = len(usable_cores()) if request.device == "cpu" else 1
    device = "cpu" if request.device == "cpu" else "cuda"
    # One worker with all cores, and one worker for each core.
    speeds = {
        workers: training_speeds(
            models,
            threads=max(1, cores // workers),
            vocab_size=vocab_size,
            sequence_length=length,
            sequences=MEASURED_TOKENS // length,
            device=device,
        )
        for workers in {1, cores}
    }
    return choose(text, request.seconds, sizes, speeds, length), speeds


# --- the files --------------------------------------------------------------------------------------------------------


def _data_toml(request: Request, size: int, documents: Documents) -> str:
    tokenizer = f"path = {_toml(request.start)} # that of the model to go on from"
    if not request.start:
        tokenizer = (
            f"train = {vocabulary(size)} # tokens of a byte-level BPE: half the root of the bytes of text (Heaps' law)"
        )
    separator = {"files": "", "paragraphs": 'separator = ""\n', "pieces": f"cut = {PIECE} # characters\n"}[
        documents.unit
    ]
    if separator:
        separator = f"# {documents.sentence}\n{separator}"
    return f"""\
# Written by epochal init. Every key is explained in configs/data/TEMPLATE.toml of the repository.
licence = "not stated" # copied into the model card

[source]
files = {_toml(list(request.files))}
{separator}
[tokenizer]
{tokenizer}

[split] # by content: a document keeps its split when text is added
validation = {_split(request, size)}
test = {_split(request, size)}
"""


def _split(request: Request, size: int) -> float:
    """Return the share of the documents in each of validation and test."""
    enough = 3 * HELD_OUT * SEQUENCE_LENGTH[request.device] / size
    return round(min(LARGEST_SPLIT, max(SPLIT, enough)), 2)


def _scale_toml(request: Request, text: Text, choice: Choice, speeds: dict[int, dict[str, float]]) -> str:
    final, control, proxy = choice.final, choice.control, choice.proxy
    ladder = sorted({s.model: s for s in (proxy or final, final, control)}.values(), key=lambda s: s.parameters)
    rungs = "\n".join(
        f"[[ladder]] # {shape.parameters:,} parameters\nmodel = {_toml(shape.model)}\n{_START if not i else ''}"
        for i, shape in enumerate(ladder)
    )
    order = "documents" if text.documents >= FEWEST_DOCUMENTS else "sequences"
    where = "GPU" if request.device == "gpu" else "CPU cores" if choice.workers == 1 else "CPU core"
    cores = len(usable_cores()) if request.device == "cpu" else 1
    each = cores // choice.workers
    flops = 6 * final.parameters * speeds[choice.workers][final.model] * choice.workers
    return f"""\
# Written by epochal init for {request.seconds / 60:g} minutes. The rules behind it are docs/regime.md of the repository.
{_commented(choice.reasons)}
data = {_toml(request.name)}
recipes = ["controls", "best_model"]
unique_tokens = [{final.tokens}] # D: {final.tokens / text.tokens:.1%} of the {text.tokens:,} training tokens
sequence_length = {choice.sequence_length}
batch_size = {choice.batch_size} # sequences
precision = {_toml("bf16" if request.device == "gpu" else "fp32")}
data_order = {_toml(order)}
warmup = 0.05
num_evals = 8

[grid] # what `epochal run heavy_weight_decay` would search
lr = {_toml(list(LEARNING_RATES))}
epochs = [{final.epochs}]
wd = {_toml(sorted({0.1, *choice.wds}))}

{rungs}
[controls] # one pass over the same text by the largest model that takes no longer than the final one
model = {_toml(control.model)}
lr = {choice.lr}
tokens = {control.tokens}

[best_model]
model = {_toml(final.model)}
epochs = {final.epochs}
lr = {choice.lr}
wd = {choice.wd} # averaging window of 0.35 epochs
{_start(request)}{_proxy_toml(proxy, choice)}{_ensemble_toml(choice)}
[hardware] # measured by epochal init
device = {_toml(f"{each} {where}" if each > 1 else where)}
devices = {choice.workers}
flops = {flops:.3g}
"""


_START = "lr = 0.01\nepochs = 1\n"


def _start(request: Request) -> str:
    return f"init_from = {_toml(request.start)}\n" if request.start else ""


def _proxy_toml(proxy: Shape | None, choice: Choice) -> str:
    if proxy is None:
        return "# There is no time to tune lr and wd; a proxy would be: proxy, proxy_epochs, lrs, wds.\n"
    return f"""\
proxy = {_toml(proxy.model)} # lr and wd are tuned on this model
proxy_epochs = {proxy.epochs}
lrs = {_toml(list(LEARNING_RATES))}
wds = {_toml(list(choice.wds))}
"""


def _ensemble_toml(choice: Choice) -> str:
    if choice.members == 1:
        return "members = 1 # more of them help where text is the limit\n"
    return f"""\
members = {choice.members}
student_epochs = {STUDENT_EPOCHS * choice.final.epochs}
"""


def _commented(reasons: tuple[str, ...]) -> str:
    return "\n".join(
        line for reason in reasons for line in textwrap.wrap(reason, 110, initial_indent="# ", subsequent_indent="# ")
    )


def _toml(value: Any) -> str:
    """Write a string, a number or a list of them as TOML."""
    # JSON writes these as TOML does.
    return json.dumps(value, ensure_ascii=False)


# --- what the user reads ----------------------------------------------------------------------------------------------


def _summary(request: Request, text: Text, vocab_size: int, choice: Choice, documents: Documents) -> list[str]:
    final, control, proxy, name = choice.final, choice.control, choice.proxy, request.name
    lines = [
        f"text: {text.bytes:,} bytes; {text.tokens:,} training tokens in {text.documents:,} documents; vocabulary {vocab_size:,}; "
        f"{_split(request, text.bytes):.0%} of the documents are held out for validation, as many for testing",
        *([documents.sentence] if documents.sentence else []),
        *choice.reasons,
        f"Batch: {choice.batch_size} sequences of {choice.sequence_length} tokens; it grows with the root of all tokens.",
        f"Start: lr {choice.lr}, wd {choice.wd} (an averaging window of 0.35 epochs).",
    ]
    lines.append(
        f"Tuning: lr and wd on {proxy.model} with {proxy.epochs} epoch{'s' * (proxy.epochs > 1)}, 5 runs of {_time(proxy.seconds)}."
        if proxy
        else "Tuning: no time for it."
    )
    lines.append(
        f"Control: one pass of {control.model} ({control.parameters:,} parameters), {_time(control.seconds)}; the final model: "
        f"{_time(final.seconds)}."
    )
    lines += cautions(text, vocab_size, final.tokens)
    return [
        *lines,
        f"Cost: about {_time(choice.seconds)} on this machine, as measured now; epochal plan --scale {name} shows it by job.",
        f"To change: configs/scales/{name}.toml (models, epochs, members) and configs/data/{name}.toml (files, vocabulary).",
        f"Next: epochal run --scale {name}, then epochal export best FOLDER --scale {name}",
    ]


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
