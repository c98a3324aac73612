"""Two multiple-choice tasks for lm-eval, generated from a test split, without a network.

A passage is a line of a document (in the King James Bible a verse), or a sentence if the document has only one line.
`cloze`: which word ends this passage? `next_passage`: which passage follows? Each question has four choices; wrong ones
come from other documents.
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
MAX_QUESTIONS = 2000
# Candidates considered for the wrong choices of a question.
DRAWS = 64
# Shorter passages are not used.
MIN_WORDS = 4


@dataclass(frozen=True)
class Passage:
    """A passage, its document's number, and the next passage of that document, if any."""

    text: str
    document: int
    following: str | None


def write_tasks(store: TokenStore, folder: Path) -> None:
    """Write cloze.yaml and next_passage.yaml with their questions to `folder`, for lm-eval's `TaskManager`.

    The files are a function of the store. Raises ValueError if the test split is too small for any question.
    """
    passages = [passage for number, text in enumerate(_documents(store)) for passage in _passages(text, number)]
    for task, generated in (("cloze", _cloze(passages)), ("next_passage", _next_passage(passages))):
        questions = list(itertools.islice(generated, MAX_QUESTIONS))
        if not questions:
            raise ValueError(
                f"the test split of {store.folder.name} is too small for the task {task!r}; use more text."
            )
        rows = "".join(json.dumps(question) + "\n" for question in questions)
        _write(folder / f"{task}.jsonl", rows)
        # lm-eval reads YAML; JSON is a subset of it.
        _write(folder / f"{task}.yaml", json.dumps(_task(task, (folder / f"{task}.jsonl").resolve()), indent=1))


def _write(path: Path, text: str) -> None:
    # An unchanged file is not rewritten: `datasets` uses the modification time as cache key.
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
        # As in the text itself: passages are lines, and words are separated by spaces.
        "target_delimiter": "\n" if name == "next_passage" else " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _documents(store: TokenStore) -> list[str]:
    tokenizer = store.tokenizer()
    ends = np.cumsum(store.lengths("test"))
    if not len(ends):
        return []
    return [str(tokenizer.decode(part.tolist())) for part in np.split(store.tokens("test"), ends[:-1])]


def _passages(text: str, document: int) -> list[Passage]:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) == 1:
        lines = re.split(r"(?<=[.!?])\s+", lines[0])
    return [
        Passage(line, document, following)
        for line, following in zip(lines, [*lines[1:], None], strict=True)
        if len(line.split()) >= MIN_WORDS
    ]


def _cloze(passages: list[Passage]) -> Iterator[dict[str, Any]]:
    # Wrong choices are last words of other documents, drawn by frequency, so that a common word is not a better guess.
    split = [(passage, *_last_word(passage.text)) for passage in passages]
    last_words = [(word, passage.document) for passage, _, word in split if word]
    for number, (passage, context, answer) in enumerate(split):
        candidates = random.Random(f"cloze/{number}").choices(last_words, k=DRAWS) if answer else []
        wrong = [word for word, document in candidates if document != passage.document and word != answer]
        wrong = list(dict.fromkeys(wrong))[: CHOICES - 1]
        if len(wrong) == CHOICES - 1:
            yield _question(context, answer, wrong, number)


def _last_word(text: str) -> tuple[str, str]:
    """Split "and the evening." into ("and the", "evening"); the word is "" if it is short or has other characters."""
    context, _, last = text.rpartition(" ")
    word = last.rstrip(".,;:!?")
    return context, word if word.isalpha() and len(word) > 2 else ""


def _next_passage(passages: list[Passage]) -> Iterator[dict[str, Any]]:
    # Wrong choices have about the length of the true one, because unnormalized accuracy favors short choices.
    ordered = sorted({(len(passage.text), passage.text, passage.document) for passage in passages})
    for number, passage in enumerate(passages):
        answer = passage.following
        if answer is None or len(answer.split()) < MIN_WORDS:
            continue
        position = bisect.bisect(ordered, (len(answer),))
        candidates = ordered[max(0, position - DRAWS) : position + DRAWS]
        # Sorted, because the order of a set differs from run to run.
        others = sorted({text for _, text, document in candidates if document != passage.document} - {answer})
        nearest = sorted(others, key=lambda text: abs(len(text) - len(answer)))[: 4 * CHOICES]
        if len(nearest) >= CHOICES - 1:
            wrong = random.Random(f"next/{number}").sample(nearest, CHOICES - 1)
            yield _question(passage.text, answer, wrong, number)


def _question(context: str, answer: str, wrong: list[str], number: int) -> dict[str, Any]:
    choices = [answer, *wrong]
    # Seeded by the question, so the files are a function of the store.
    random.Random(f"order/{number}").shuffle(choices)
    return {"context": context, "choices": choices, "answer": choices.index(answer)}
