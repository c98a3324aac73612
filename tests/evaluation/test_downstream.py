"""lm-eval on runs, ensembles and exported folders, without a network, against loops over questions."""

import json
import math
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from epochal.cli import main
from epochal.config import REPOSITORY
from epochal.data.store import TokenStore
from epochal.evaluation.downstream import continue_text, open_model, score
from epochal.evaluation.ensembles import evaluate_ensemble
from epochal.evaluation.offline_tasks import TASKS, write_tasks
from epochal.export.huggingface import export
from epochal.generation.sample import sample_texts
from epochal.models.ensemble import EnsembleForCausalLM
from epochal.models.folder import save_model
from epochal.models.llama import build_model
from epochal.records import Record, Records, Workspace, load_records, write_record
from epochal.run import Ensemble, Run, Samples, SoftTargetDistillation, fingerprint
from epochal.training.loop import train

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

Campaign = tuple[Workspace, Records, TokenStore]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    """Two finished runs and their ensemble."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("campaign"))
    for seed, name in enumerate("ab"):
        run = tiny.run(config, name=name, init_seed=seed, sequence_length=128, batch_size=1)
        write_record(space, Record(run, fingerprint(run), "done", {"loss": 3.0, "parameters": 1000}))
        model = build_model("w16", vocab_size=store.vocab_size, max_positions=128, seed=seed, bos_token_id=0)
        with torch.no_grad():
            model.lm_head.weight.mul_(3.0)
        save_model(model, store.tokenizer_folder, space.folder(name) / "model")
    both = Ensemble(name="both", runs=("a", "b"), average="probs")
    results = {"loss": 3.0, "parameters": 2000, "members": 2, "curve": {"2": [3.0]}}
    write_record(space, Record(both, fingerprint(both), "done", results))
    return space, load_records(space), store


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def questions(store: TokenStore, folder: Path, task: str) -> list[dict[str, Any]]:
    write_tasks(store, folder)
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def expected_answers(model: Any, tokenizer: Any, examples: list[dict[str, Any]], delimiter: str) -> str:
    """A "1" for each question whose true choice has the highest log-probability given the context, else a "0"."""
    right = ""
    for question in examples:
        sums = []
        before = tokenizer(question["context"]).input_ids
        for choice in question["choices"]:
            whole = torch.tensor([tokenizer(question["context"] + delimiter + choice).input_ids])
            with torch.no_grad():
                log_probs = model(whole).logits[0, :-1].double().log_softmax(-1)
            sums.append(log_probs.gather(1, whole[0, 1:, None])[len(before) - 1 :].sum().item())
        right += "01"[sums.index(max(sums)) == question["answer"]]
    return right


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["a", "both"])
def test_accuracy_equals_a_loop_over_questions(campaign: Campaign, tmp_path: Path, name: str) -> None:
    space, records, store = campaign
    model, tokenizer, data_store = open_model(name, space, records)
    assert data_store is not None and data_store.folder == store.folder
    accuracies = score(model, tokenizer, list(TASKS), store=store, limit=40)
    for task, delimiter in zip(TASKS, (" ", "\n"), strict=True):
        examples = questions(store, tmp_path, task)[:40]
        assert accuracies[task].questions == len(examples) > 10
        assert accuracies[task].right == expected_answers(model, tokenizer, examples, delimiter)
        assert accuracies[task].value == pytest.approx(accuracies[task].right.count("1") / len(examples))


@pytest.mark.usefixtures("no_network")
def test_an_ensemble_job_with_tasks_records_accuracy_and_the_same_loss(campaign: Campaign, tmp_path: Path) -> None:
    space, records, store = campaign
    job = Ensemble(name="examples", runs=("a", "b"), average="logits", tasks=("cloze",))
    results = evaluate_ensemble(job, space, records).results
    assert results["loss"] == evaluate_ensemble(replace(job, tasks=()), space, records).results["loss"]
    members = [AutoModelForCausalLM.from_pretrained(space.folder(name) / "model") for name in "ab"]
    together = lambda rows: SimpleNamespace(logits=(members[0](rows).logits + members[1](rows).logits) / 2)  # noqa: E731
    examples = questions(store, tmp_path, "cloze")
    cloze, share = results["tasks"]["cloze"], results["tasks"]["cloze"]["value"]
    assert cloze["right"] == expected_answers(together, open_model("a", space, records)[1], examples, " ")
    assert list(results["tasks"]) == ["cloze"] and cloze["questions"] == len(examples)
    assert share == pytest.approx(cloze["right"].count("1") / len(examples))
    assert cloze["error"] == pytest.approx(math.sqrt(share * (1 - share) / len(examples)))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["a", "both"])
def test_an_exported_folder_has_the_same_accuracy(campaign: Campaign, tmp_path: Path, name: str) -> None:
    space, records, store = campaign
    export(name, tmp_path / "out", space, records)
    model, tokenizer, data_store = open_model(str(tmp_path / "out"), space, records)
    assert isinstance(model, EnsembleForCausalLM) == (name == "both")
    assert data_store is not None and data_store.folder == store.folder
    original, _, _ = open_model(name, space, records)
    expected = score(original, tokenizer, ["next_passage"], store=store, limit=20)
    assert score(model, tokenizer, ["next_passage"], store=data_store, limit=20) == expected


@pytest.mark.usefixtures("no_network")
def test_a_student_of_another_architecture_is_exported_and_scored(campaign: Campaign, tmp_path: Path) -> None:
    space, records, store = campaign
    shape = json.loads((REPOSITORY / "configs" / "models" / "w16.json").read_text())
    shape |= {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True}
    (tmp_path / "other.json").write_text(json.dumps(shape))
    teacher = records.named("a")
    assert teacher is not None and isinstance(teacher.job, Run)
    teach = SoftTargetDistillation(source="both", kd_weight=0.5)
    student = replace(teacher.job, name="student", model=str(tmp_path / "other.json"), epochs=1, teach=teach)
    record = train(student, space)
    assert record is not None and record.inputs.keys() == {"both", "a", "b"}
    write_record(space, record)
    export("student", tmp_path / "out", space, load_records(space))
    (space.records / "student.json").unlink()
    model, tokenizer, data_store = open_model(str(tmp_path / "out"), space, records)
    assert (model.config.hidden_size, model.config.num_key_value_heads) == (24, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert data_store is not None
    accuracies = score(model, tokenizer, list(TASKS), store=data_store, limit=20)
    for task, delimiter in zip(TASKS, (" ", "\n"), strict=True):
        assert accuracies[task].right == expected_answers(
            model, tokenizer, questions(store, tmp_path, task)[:20], delimiter
        )


def test_questions_are_deterministic_and_use_every_answer_position(campaign: Campaign, tmp_path: Path) -> None:
    _, _, store = campaign
    for task in TASKS:
        examples = questions(store, tmp_path / "one", task)
        assert examples == questions(store, tmp_path / "two", task)
        assert len({question["answer"] for question in examples}) == 4
        for question in examples:
            assert len(set(question["choices"])) == 4 and question["context"].strip()
    from tokenizers import Tokenizer

    text = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json")).decode(store.tokens("test").tolist())
    for question in questions(store, tmp_path / "one", "cloze"):
        assert f"{question['context']} {question['choices'][question['answer']]}" in text
    for question in questions(store, tmp_path / "one", "next_passage"):
        assert f"{question['context']} {question['choices'][question['answer']]}" in text


@pytest.mark.usefixtures("no_network")
def test_a_user_task_file(campaign: Campaign, tmp_path: Path) -> None:
    space, records, _ = campaign
    rows = [{"q": "And the king", "good": " saw", "bad": " zzz"}] * 3
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/mine.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{[good, bad]}}'\n"
        "doc_to_target: 0\ntarget_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    model, tokenizer, _ = open_model("a", space, records)
    accuracies = score(model, tokenizer, ["mine"], task_folder=tmp_path)
    assert accuracies["mine"].questions == 3 and accuracies["mine"].value in (0.0, 1.0)


def test_unknown_and_unavailable_tasks_raise(campaign: Campaign) -> None:
    space, records, _ = campaign
    model, tokenizer, _ = open_model("a", space, records)
    with pytest.raises(ValueError, match=r"task 'next_pasage' is unknown \(did you mean 'next_passage'"):
        score(model, tokenizer, ["next_pasage"])
    with pytest.raises(ValueError, match="the data of task 'sciq' cannot be loaded"):
        score(model, tokenizer, ["sciq"])


def test_an_answer_longer_than_the_models_positions_is_refused(campaign: Campaign) -> None:
    space, records, store = campaign
    _, tokenizer, _ = open_model("a", space, records)
    model = build_model("w16", vocab_size=store.vocab_size, max_positions=8, seed=0, bos_token_id=0)
    with pytest.raises(ValueError, match=r"an answer of next_passage has \d+ tokens, and the model reads 8; leave"):
        score(model, tokenizer, ["next_passage"], store=store)


PUBLIC = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "piqa": ("baber/piqa", "default", "validation"),
    "sciq": ("allenai/sciq", "default", "test"),
}
"""The paper's tasks: data set, configuration and split in lm-eval."""


def public_rows() -> dict[str, list[dict[str, Any]]]:
    """A few questions in the columns of each data set."""
    examples = [
        (f"Who saw {thing}?", [f"the {who}" for who in tiny.SPEAKERS[k : k + 4]])
        for k, thing in enumerate(tiny.THINGS[:3])
    ]
    return {
        "arc_easy": [
            {"question": q, "choices": {"text": c, "label": [*"ABCD"]}, "answerKey": "ABCD"[k]}
            for k, (q, c) in enumerate(examples)
        ],
        "piqa": [{"goal": q, "sol1": c[0], "sol2": c[1], "label": k % 2} for k, (q, c) in enumerate(examples)],
        "sciq": [
            {"support": "", "question": q, "correct_answer": c[0], **{f"distractor{k}": c[k] for k in (1, 2, 3)}}
            for q, c in examples
        ],
    }


def as_questions(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """The question of lm-eval 0.4 for a row."""
    if task == "arc_easy":
        answer = row["choices"]["label"].index(row["answerKey"])
        return {"context": f"Question: {row['question']}\nAnswer:", "choices": row["choices"]["text"], "answer": answer}
    if task == "piqa":
        return {
            "context": f"Question: {row['goal']}\nAnswer:",
            "choices": [row["sol1"], row["sol2"]],
            "answer": row["label"],
        }
    choices = [row["distractor1"], row["distractor2"], row["distractor3"], row["correct_answer"]]
    return {"context": f"\nQuestion: {row['question']}\nAnswer:", "choices": choices, "answer": 3}


def fill_cache(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    """Write the data sets to a Hugging Face cache, as a download would."""
    from datasets import load_dataset

    for task, (repository, configuration, split) in PUBLIC.items():
        source = folder / "source" / repository.split("/")[1]
        source.mkdir(parents=True)
        for part in ("train", split):  # lm-eval also loads the training split
            (source / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[task]))
        files = ", ".join(f"{{split: {part}, path: {part}.jsonl}}" for part in ("train", split))
        (source / "README.md").write_text(
            f"---\nconfigs: [{{config_name: {configuration}, data_files: [{files}]}}]\n---\n"
        )
        load_dataset(str(source), configuration, cache_dir=str(folder / "prepared"))
        (prepared,) = (path.parent for path in (folder / "prepared" / source.name).rglob("dataset_info.json"))
        target = folder / "cache" / repository.replace("/", "___") / configuration / "0.0.0" / ("0" * 40)
        target.parent.mkdir(parents=True)
        prepared.rename(target)
    return folder / "cache"


@pytest.mark.usefixtures("no_network")
def test_the_papers_tasks_run_from_the_cache(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, records, _ = campaign
    rows = public_rows()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", fill_cache(tmp_path, rows))
    model, tokenizer, _ = open_model("both", space, records)
    accuracies = score(model, tokenizer, list(PUBLIC))
    assert list(accuracies) == ["arc_easy", "piqa", "sciq"]
    for task, accuracy in accuracies.items():
        assert accuracy.right == expected_answers(
            model, tokenizer, [as_questions(task, row) for row in rows[task]], " "
        ), task


@pytest.mark.parametrize("name", ["a", "both"])
def test_generation_continues_a_prompt(campaign: Campaign, name: str) -> None:
    space, records, _ = campaign
    job = Samples(name="text", source=name, tokens=20, max_length=20, seed=3)
    text = continue_text("And the king", job, space, records)
    assert text.startswith("And the king") and len(text) > len("And the king")
    torch.manual_seed(0)
    assert continue_text("And the king", job, space, records) == text
    with pytest.raises(ValueError, match="shorten it"):
        continue_text("And the king " * 100, job, space, records)


def test_a_folder_without_a_record_has_no_store(campaign: Campaign, tmp_path: Path) -> None:
    space, records, store = campaign
    model = AutoModelForCausalLM.from_pretrained(space.folder("a") / "model")
    save_model(model, store.tokenizer_folder, tmp_path / "plain")
    assert open_model(str(tmp_path / "plain"), space, records)[2] is None


@pytest.mark.usefixtures("no_network")
def test_the_command_line(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space, records, store = campaign
    options = ["--results", str(space.results), "--work", str(space.work)]
    monkeypatch.setattr("epochal.scale.load_scale", lambda _: SimpleNamespace(name=space.scale))

    def output_of(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["epochal", *arguments, *options])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out.splitlines()

    assert any("loads it" in line for line in output_of("export", "both", str(tmp_path / "out")))
    for name in ("both", str(tmp_path / "out")):
        lines = output_of("eval", name, "--tasks", "cloze,next_passage", "--limit", "20")[-3:]
        assert [line.split(":")[0] for line in lines] == ["cloze", "next_passage", "mean"] and "20 questions" in lines[
            0
        ]
    tokens = torch.from_numpy(store.sequences("validation", 128)).long()
    chances = []
    for name in "ab":
        model = AutoModelForCausalLM.from_pretrained(space.folder(name) / "model").double()
        with torch.no_grad():
            chances.append(model(tokens).logits[:, :-1].softmax(-1).gather(2, tokens[:, 1:, None]))
    for name, chance in (("a", chances[0]), ("both", (chances[0] + chances[1]) / 2)):
        validation, test = output_of("eval", name)
        computed, recorded = map(float, re.findall(r"\d+\.\d+", validation))
        assert computed == pytest.approx(-chance.log().mean().item(), abs=2e-6)
        assert recorded == 3.0 and test.startswith("test: ")
    assert output_of("generate", "both", "--prompt", "And the king", "--tokens", "5")[0].startswith("And the king")
    text = Samples(name="text", source="both", tokens=40, max_length=40, draw="average")
    averaged = "\n".join(sample_texts(text, space, records))
    assert averaged != "\n".join(sample_texts(replace(text, draw="members"), space, records))
    assert "\n".join(output_of("generate", "both", "--tokens", "40")) == averaged
