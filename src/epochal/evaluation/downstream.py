"""Accuracy on lm-eval's multiple-choice tasks, zero-shot: the paper's downstream measure (spec section 10).

"acc": the choice whose tokens have the highest total log-probability, not divided by length. Besides lm-eval's own tasks
there are those of `offline_tasks`, made from the test split, which need no network.
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
from epochal.evaluation.offline_tasks import TASKS, write_tasks
from epochal.models.load import RECORD, load_source, member_records
from epochal.records import Records, Workspace
from epochal.run import Run, Samples

log = logging.getLogger(__name__)


def open_model(name: str, workspace: Workspace, records: Records) -> tuple[Any, Any, TokenStore | None]:
    """Return (model, tokenizer, token store) of a finished job or of an exported folder.

    The store is None for a folder that is no export of ours, or whose data set is not prepared here.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name)
    if not (folder / "config.json").is_file():
        run = member_records(name, records)[0].job
        assert isinstance(run, Run)
        store = open_store(run.data, workspace)
        return load_source(name, workspace, records), AutoTokenizer.from_pretrained(store.tokenizer_folder), store
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), _store_of(folder, workspace)


def continue_text(prompt: str, samples: Samples, workspace: Workspace, records: Records) -> str:
    """Return `prompt` and up to `samples.tokens` sampled tokens after it, as far as the model's context reaches.

    Raises ValueError when the prompt fills the context.
    """
    import torch

    model, tokenizer, _ = open_model(samples.source, workspace, records)
    rows = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    room = model.config.max_position_embeddings - rows.shape[1]
    if room < 1:
        raise ValueError(
            f"the prompt has {rows.shape[1]} tokens and the context of {samples.source!r} is "
            f"{model.config.max_position_embeddings}; shorten it."
        )
    torch.manual_seed(samples.seed)
    drawn = model.generate(
        rows.to(model.device),
        attention_mask=torch.ones_like(rows).to(model.device),
        do_sample=True,
        top_k=0,
        temperature=samples.temperature,
        max_new_tokens=min(samples.tokens, room),
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))


def _store_of(folder: Path, workspace: Workspace) -> TokenStore | None:
    """The token store that an exported model was trained or judged on, else that of an ensemble's first member."""
    for path in (folder / RECORD, folder / "member-00" / RECORD):
        job = json.loads(path.read_text(encoding="utf-8"))["job"] if path.is_file() else {}
        if job.get("data"):
            try:
                return open_store(job["data"], workspace)
            except ValueError as error:
                log.warning("the tasks %s cannot be made: %s", ", ".join(TASKS), error)
    return None


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, its standard error over questions, their number, and each answer.

    `right` has a 1 or a 0 for each question in the task's order: models that answered the same questions compare in pairs.
    """

    value: float
    error: float
    questions: int
    right: str


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
    """Return the zero-shot accuracy of a transformers model on each task, in the order asked for.

    `store` is where the offline tasks come from, `task_folder` holds task files of the user's own, `limit` asks only the
    first questions. Raises ValueError for an unknown task, one without accuracy, or one whose data is not there.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [task_folder] if task_folder is not None else []
    if store is not None and set(tasks) & set(TASKS):
        write_tasks(store, store.folder.parent / f"{store.folder.name}-tasks")
        own.append(store.folder.parent / f"{store.folder.name}-tasks")
    manager = _manager(tuple(str(path) for path in own), tasks)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    found = lm_eval.simple_evaluate(
        harness,
        tasks=_load(manager, tasks),
        num_fewshot=0,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
    )
    return {task: _accuracy(task, found["samples"][task]) for task in tasks}


def _manager(folders: tuple[str, ...], tasks: list[str]) -> Any:
    """Return a manager that knows the tasks; lm-eval's own, which take seconds to list, only where they are needed."""
    manager = _tasks_in(folders, defaults=False)
    if set(tasks) - set(manager.all_subtasks):
        manager = _tasks_in(folders, defaults=True)
    for task in tasks:
        if task not in manager.all_subtasks:
            known = [*manager.all_subtasks, *TASKS]
            raise ValueError(f"task {task!r} is unknown{nearest(task, known)}; see lm-eval ls subtasks.")
    return manager


@functools.cache
def _tasks_in(folders: tuple[str, ...], *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=defaults)


def _load(manager: Any, tasks: list[str]) -> list[Any]:
    """Load the tasks with their data; raises ValueError naming one whose data cannot be had."""
    loaded = []
    for task in tasks:
        try:
            loaded += manager.load([task])["tasks"].values()
        except OSError as error:  # ConnectionError and datasets' own errors of missing data are OSErrors
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"the data of task {task!r} cannot be loaded ({reason}); fetch it once with a network, or use "
                f"{' or '.join(TASKS)}, which need none."
            ) from None
    return loaded


def _accuracy(task: str, samples: list[dict[str, Any]]) -> Accuracy:
    if not all("acc" in sample for sample in samples):
        raise ValueError(f"task {task!r} reports no accuracy; choose a multiple-choice task such as {TASKS[0]}.")
    right = [bool(sample["acc"]) for sample in sorted(samples, key=lambda sample: int(sample["doc_id"]))]
    value, questions = sum(right) / len(right), len(right)
    error = math.sqrt(value * (1 - value) / questions)
    return Accuracy(value, error, questions, "".join("01"[answer] for answer in right))
