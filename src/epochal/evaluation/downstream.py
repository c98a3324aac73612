"""Zero-shot accuracy on lm-eval's multiple-choice tasks, the paper's downstream metric (spec section 10).

lm-eval's "acc": the model's answer is the choice with the highest total log-probability, not normalized by length. The
tasks of `offline_tasks` are generated from the test split and need no network.
"""

import functools
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epochal.config import nearest
from epochal.data.store import TokenStore, open_store
from epochal.data.tokenizer import auto_tokenizer
from epochal.evaluation.offline_tasks import TASKS, write_tasks
from epochal.models.files import open_model as open_folder
from epochal.models.load import RECORD, load_source, member_records
from epochal.records import Records, Workspace
from epochal.run import Run, Samples

log = logging.getLogger(__name__)


def open_model(name: str, workspace: Workspace, records: Records) -> tuple[Any, Any, TokenStore | None]:
    """Return (model, tokenizer, token store) of a finished job or of an exported folder.

    The store is None for a folder that `export` did not write, or whose data set is not prepared.
    """
    folder = Path(name)
    if not (folder / "config.json").is_file():
        run = member_records(name, records)[0].job
        assert isinstance(run, Run)
        store = open_store(run.data, workspace)
        return load_source(name, workspace, records), auto_tokenizer(store.tokenizer_folder), store
    return open_folder(folder), auto_tokenizer(folder), _store_of(folder, workspace)


def continue_text(prompt: str, samples: Samples, workspace: Workspace, records: Records) -> str:
    """Return `prompt` with up to `samples.tokens` sampled tokens appended, within the model's context.

    Raises ValueError if the prompt fills the context.
    """
    import torch

    model, tokenizer, _ = open_model(samples.source, workspace, records)
    context = model.config.max_position_embeddings
    rows = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    if rows.shape[1] >= context:
        raise ValueError(
            f"the prompt has {rows.shape[1]} tokens, but the context of {samples.source!r} is {context}; shorten it."
        )
    torch.manual_seed(samples.seed)
    sampled = model.generate(
        rows.to(model.device),
        attention_mask=torch.ones_like(rows).to(model.device),
        do_sample=True,
        # The model's own distribution: transformers keeps only 50 tokens by default.
        top_k=0,
        temperature=samples.temperature,
        max_new_tokens=min(samples.tokens, context - rows.shape[1]),
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(sampled[0], skip_special_tokens=True))


def _store_of(folder: Path, workspace: Workspace) -> TokenStore | None:
    """Return the token store that the record of an exported model names."""
    # The folder of an ensemble has no record, but those of its members do.
    for path in (folder / RECORD, folder / "member-00" / RECORD):
        job = json.loads(path.read_text(encoding="utf-8"))["job"] if path.is_file() else {}
        if job.get("data"):
            try:
                return open_store(job["data"], workspace)
            # The store is needed for the offline tasks only, so others may still be scored.
            except ValueError as error:
                log.warning("the tasks %s are not available: %s", ", ".join(TASKS), error)
    return None


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Share of correct answers, its standard error over questions, and each answer.

    `right` has a "1" or "0" for each question in the task's order, for paired comparisons between models.
    """

    value: float  # share of correct answers
    error: float  # standard error over questions
    questions: int
    right: str  # "1" or "0" for each question, for paired comparisons


def score(
    model: Any,
    tokenizer: Any,
    tasks: list[str],
    *,
    store: TokenStore | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Accuracy]:
    """Return the zero-shot accuracy of a transformers model on each task, in order.

    Offline tasks are generated from `store`; `task_folder` has additional lm-eval task files; `limit` is the number of
    questions per task. Raises ValueError for a task that is unknown, has no accuracy, whose data cannot be loaded, or an answer
    longer than the model's positions.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [task_folder] if task_folder is not None else []
    if store is not None and set(tasks) & set(TASKS):
        folders.append(store.folder.parent / f"{store.folder.name}-tasks")
        write_tasks(store, folders[-1])
    manager = _manager(tuple(str(path) for path in folders), tasks)

    class Harness(HFLM):  # type: ignore[misc]
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            encoded: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            if len(encoded[1]) > self.max_length:
                raise ValueError(
                    f"an answer of {' or '.join(tasks)} has {len(encoded[1])} tokens, and the model reads {self.max_length}; "
                    "leave the task out, or train with longer sequences."
                )
            return encoded

    harness = Harness(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        harness,
        tasks=_load(manager, tasks),
        num_fewshot=0,
        limit=limit,
        # The standard error is that of a share, computed below; lm-eval would resample for minutes.
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
    )
    return {task: _accuracy(task, results["samples"][task]) for task in tasks}


def _manager(folders: tuple[str, ...], tasks: list[str]) -> Any:
    # lm-eval takes seconds to list its own tasks, so they are included only if needed.
    manager = _tasks_in(folders, defaults=False)
    if set(tasks) - set(manager.all_subtasks):
        manager = _tasks_in(folders, defaults=True)
    for task in tasks:
        if task not in manager.all_subtasks:
            known = [*manager.all_subtasks, *TASKS]
            raise ValueError(f"task {task!r} is unknown{nearest(task, known)}; list tasks with `lm-eval ls subtasks`.")
    return manager


@functools.cache
def _tasks_in(folders: tuple[str, ...], *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _load(manager: Any, tasks: list[str]) -> list[Any]:
    loaded = []
    for task in tasks:
        try:
            loaded += manager.load([task])["tasks"].values()
        except OSError as error:  # includes ConnectionError and the errors of `datasets` for missing data
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"the data of task {task!r} cannot be loaded ({reason}); download it once with network access, or "
                f"use {' or '.join(TASKS)}, which need none."
            ) from None
    return loaded


def _accuracy(task: str, samples: list[dict[str, Any]]) -> Accuracy:
    if not all("acc" in sample for sample in samples):
        raise ValueError(f"task {task!r} has no accuracy; choose a multiple-choice task such as {TASKS[0]}.")
    # In the order of documents, so that answers of two models can be paired.
    right = [bool(sample["acc"]) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
    value, questions = sum(right) / len(right), len(right)
    error = math.sqrt(value * (1 - value) / questions)
    return Accuracy(value, error, questions, "".join("01"[answer] for answer in right))
