"""Two multiple-choice tasks for lm-eval made from the test split of a token store: no network, no other data.

A passage is a line of a document (in the King James Bible a verse), or a sentence where a document has one line. `cloze`:
which word ends this passage? `next_passage`: which passage follows? Each has four choices; the false ones are taken from
other documents, and for `next_passage` they are about as long as the true one, since raw accuracy favours short choices.
"""

import bisect
import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from epochal.config import write_atomic
from epochal.data.store import TokenStore

TASKS = ("cloze", "next_passage")
CHOICES = 4
MOST_QUESTIONS = 2000
DRAWS = 64
"""Passages looked at for the false choices of one question."""
FEWEST_WORDS = 4
"""Words of the shortest passage that is asked about."""


@dataclass(frozen=True)
class Passage:
    """A passage, its document's number, and the passage after it in the same document, if any."""

    text: str
    document: int
    following: str | None


def write_tasks(store: TokenStore, folder: Path) -> None:
    """Write cloze.yaml and next_passage.yaml with their questions into `folder`, which `TaskManager` can include.

    The same store gives the same files. Raises ValueError when the test split is too small to ask anything.
    """
    passages = [passage for number, text in enumerate(_documents(store)) for passage in _passages(text, number)]
    for task, made in (("cloze", _cloze(passages)), ("next_passage", _next_passage(passages))):
        questions = list(itertools.islice(made, MOST_QUESTIONS))
        if not questions:
            raise ValueError(
                f"the test split of {store.folder.name} is too small for the task {task!r}; use more text."
            )
        rows = "".join(json.dumps(question) + "\n" for question in questions)
        _write(folder / f"{task}.jsonl", rows)
        # A TaskManager reads YAML, of which JSON is a part.
        _write(folder / f"{task}.yaml", json.dumps(_task(task, (folder / f"{task}.jsonl").resolve()), indent=1))


def _write(path: Path, text: str) -> None:
    """Write a file unless it holds the text already: `datasets` caches by the time of the last change."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _task(name: str, questions: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "\n" if name == "next_passage" else " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _documents(store: TokenStore) -> list[str]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json"))
    ends = np.cumsum(store.lengths("test"))
    return (
        [str(tokenizer.decode(part.tolist())) for part in np.split(store.tokens("test"), ends[:-1])]
        if len(ends)
        else []
    )


def _passages(text: str, document: int) -> list[Passage]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) == 1:
        lines = re.split(r"(?<=[.!?])\s+", lines[0])
    return [
        Passage(line, document, following)
        for line, following in zip(lines, [*lines[1:], None], strict=True)
        if len(line.split()) >= FEWEST_WORDS
    ]


def _cloze(passages: list[Passage]) -> Iterator[dict[str, Any]]:
    """Leave the last word out; the false choices end passages of other documents.

    They are drawn as often as they end one, so a common word is no better guess than a rare one.
    """
    split = [(passage, *_last_word(passage.text)) for passage in passages]
    words = [(word, passage.document) for passage, _, word in split if word]
    for number, (passage, context, word) in enumerate(split):
        drawn = random.Random(f"cloze/{number}").choices(words, k=DRAWS) if word else []
        false = list(dict.fromkeys(o for o, document in drawn if document != passage.document and o != word))
        if len(false) >= CHOICES - 1:
            yield _question(context, word, false[: CHOICES - 1], number)


def _last_word(text: str) -> tuple[str, str]:
    """Split "and the evening." into ("and the", "evening"); no word where the last one is short or has other signs."""
    context, _, last = text.rpartition(" ")
    word = last.rstrip(".,;:!?")
    return context, word if word.isalpha() and len(word) > 2 else ""


def _next_passage(passages: list[Passage]) -> Iterator[dict[str, Any]]:
    """Choose among the passage that follows and three of about its length from other documents."""
    ordered = sorted({(len(passage.text), passage.text, passage.document) for passage in passages})
    for number, passage in enumerate(passages):
        true = passage.following
        if true is None or len(true.split()) < FEWEST_WORDS:
            continue
        place = bisect.bisect(ordered, (len(true),))
        around = ordered[max(0, place - DRAWS) : place + DRAWS]
        others = sorted({text for _, text, document in around if document != passage.document} - {true})
        near = sorted(others, key=lambda text: abs(len(text) - len(true)))[: 4 * CHOICES]
        if len(near) >= CHOICES - 1:
            false = random.Random(f"next/{number}").sample(near, CHOICES - 1)
            yield _question(passage.text, true, false, number)


def _question(context: str, true: str, false: list[str], number: int) -> dict[str, Any]:
    choices = [true, *false]
    random.Random(f"order/{number}").shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(true)}
