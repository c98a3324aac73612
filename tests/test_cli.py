"""The command line: wrong use is one sentence, exit code 2 and no change on disk; --help and plan are fast."""

import gzip
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from campaigns import DATA, Campaign, made_text

from epochal import cli, doctor
from epochal.campaign.environment import usable_cores
from epochal.campaign.integrity import quarantine_corrupt_inputs, write_checksums
from epochal.campaign.plan import load_recipe
from epochal.cli import main
from epochal.config import REPOSITORY
from epochal.offline import go_offline_if_unreachable
from epochal.records import Record, write_record
from epochal.run import Ensemble, Run, Samples, fingerprint
from epochal.study import Study

Refused = Callable[..., str]


def epochal(*arguments: str) -> int:
    """Run a command in this process; returns its exit code."""
    before = sys.argv
    sys.argv = ["epochal", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def listing(folder: Path) -> dict[str, bytes]:
    """The files of a folder; locks are kept, since two processes could otherwise lock two files of one name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must be refused, and return its sentence."""

    def check(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        before = listing(tmp_path)
        capsys.readouterr()
        assert epochal(*arguments) == 2
        out, err = capsys.readouterr()
        assert out.strip() == ""
        lines = err.strip().splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("epochal: ")
        assert lines[0].endswith(".")
        assert listing(tmp_path) == before
        return lines[0]

    return check


# --- text ---------------------------------------------------------------------------------------------------------------


def data_config(tmp_path: Path, name: str, content: bytes | None) -> list[str]:
    """Write a text file and a data config that names it; returns the command that prepares it."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "mine.toml").write_text(DATA.format(corpus=path))
    return ["data", str(tmp_path / "mine.toml"), "--work", str(tmp_path / "work")]


def rows(*texts: str, column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "matches no file"),
        ("a.txt", b"", "has no documents"),
        ("a.txt", b" \n\n", "has no documents"),
        ("a.txt", b"one document", "split has no documents"),
        ("a.txt", b"abc \xff\xfe", "is not UTF-8 text"),
        ("a.jsonl", rows("x") + b'{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", rows("x") + b"{text\n", "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", rows("x", column="texts"), "did you mean 'texts'"),
        ("a.jsonl", b'{"text": 3}\n', "must hold text"),
        ("a.jsonl", b"", "has no documents"),
        ("a.parquet", b"PAR", "parquet"),
        ("a.jsonl.gz", gzip.compress(rows("x", column="body"), mtime=0), "has no column 'text'"),
        ("a.docx", b"abc", "unknown file type"),
    ],
)
def test_bad_text_is_refused(refused: Refused, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    assert message in refused(*data_config(tmp_path, name, content))


def test_a_parquet_file_without_the_column_is_refused(refused: Refused, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    command = data_config(tmp_path, "a.parquet", None)
    parquet.write_table(pyarrow.table({"body": ["a", "b"]}), tmp_path / "a.parquet")
    assert "has no column 'text'" in refused(*command)


def test_data_configs_are_checked(refused: Refused, tmp_path: Path) -> None:
    command = data_config(tmp_path, "a.txt", made_text().encode())
    path = tmp_path / "mine.toml"
    good = path.read_text()
    for old, new, message in [
        ("[split]", "[spilt]", "did you mean 'split'"),
        ("train = 300", "train = 3", "train must be an integer from 256 to 4,194,304, got 3"),
        ("train = 300", "trian = 300", "did you mean 'train'"),
        ("validation = 0.1", "validation = 1.0", "leave no training text"),
        ("licence =", "license =", "did you mean 'licence'"),
        ("train = 300", "train = 300 300", "not valid TOML"),
    ]:
        assert old in good
        path.write_text(good.replace(old, new))
        assert message in refused(*command)
    assert "does not exist" in refused("data", str(tmp_path / "other.toml"))
    assert "did you mean 'kjv'" in refused("data", "kjw")


# --- scales and campaigns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("warmup =", "warmpu =", "did you mean 'warmup'"),
        ("batch_size = 4", "batch_size = 5", "use 1920 or 2080"),
        ("batch_size = 4", 'batch_size = "4"', "must be of type int"),
        ("batch_size = 4", "", "missing key 'batch_size'"),
        ('models = ["w16"]', 'models = ["w23"]', "is not on the ladder"),
        ("wd = [0.1, 0.8]", "wd = [0.8]", "standard_wd 0.1"),
        ("unique_tokens = [2048]", "unique_tokens = []", "unique_tokens is empty"),
        ("epochs = [1, 2]", "epochs = []", "grid: epochs is empty"),
        ("epochs = [1, 2]", "epochs = [2, 4]", "is not on its grid"),
        ('precision = "fp32"', 'precision = "fp8"', "choose from fp32, bf16"),
        ('model = "w16"', 'model = "w9"', "w9"),
        ('"w16"', '"w17"', "w17"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_bad_scales_are_refused(
    refused: Refused, campaign: Campaign, command: str, old: str, new: str, message: str
) -> None:
    campaign.rewrite(old, new)
    assert message in refused(command, "distillation", *campaign.options)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("unique_tokens = [2048]", "unique_tokens = [12800000]", "is above the"),
        (
            "[2048]\nsequence_length = 32\nbatch_size = 4",
            "[8192]\nsequence_length = 8192\nbatch_size = 1",
            "is longer than the validation",
        ),
    ],
)
def test_a_scale_that_needs_more_text_than_there_is_is_refused(
    refused: Refused, campaign: Campaign, old: str, new: str, message: str
) -> None:
    campaign.rewrite(old, new)
    assert message in refused("run", "epoching", *campaign.options)


def test_a_model_that_its_heads_do_not_divide_is_refused(refused: Refused, campaign: Campaign, tmp_path: Path) -> None:
    models = tmp_path / "configs" / "models"
    models.mkdir(parents=True)
    original = Path(__file__).resolve().parents[1] / "configs" / "models" / "w16.json"
    (models / "odd.json").write_text(json.dumps({**json.loads(original.read_text()), "num_attention_heads": 3}))
    campaign.rewrite('"w16"', '"odd"')
    for command in ("plan", "run"):
        assert "hidden_size 16 is not a multiple of num_attention_heads 3" in refused(
            command, "epoching", *campaign.options
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--micro-batch", "3"], "does not divide"),
        (["--preset", "ddp8"], "batch_size of 4 sequences, which 8 processes (1 node of 8) cannot share"),
        (["--preset", "ddp2", "--micro-batch", "4"], "does not divide the 2 sequences of each process"),
        (["--time-limit", "soon"], "A duration must be"),
        (["--time-limit", "-3m"], "A duration must be"),
        (["--time-limit", "nan"], "A duration must be"),
        (["--time-limit", "inf"], "A duration must be"),
        (["--checkpoint-every", "0"], "A duration must be"),
        (["--tracker", "mlflow"], "is unknown"),
        (["--preset", "none-such"], "none-such"),
    ],
)
def test_bad_options_of_run_are_refused(refused: Refused, campaign: Campaign, options: list[str], message: str) -> None:
    assert message in refused("run", "epoching", *campaign.options, *options)


def test_processes_that_cannot_share_the_batches_of_one_recipe_are_refused(refused: Refused, tmp_path: Path) -> None:
    options = ["--scale", "micro", "--results", str(tmp_path), "--work", str(tmp_path), "--preset", "ddp2"]
    # The scale's batches have 4 sequences, the smaller ones of this recipe 1.
    assert "has a batch_size of 1 sequences, which 2 processes (1 node of 2) cannot share" in refused(
        "run", "continued", *options
    )


def test_unknown_names_are_refused(refused: Refused, campaign: Campaign) -> None:
    assert "did you mean 'ensembling'" in refused("plan", "ensemblin", *campaign.options)
    assert "did you mean 'demo'" in refused("plan", "--scale", "demos")
    assert "holds no records" in refused("report", *campaign.options)
    for command in (["eval", "x"], ["generate", "x"], ["export", "x", "y"]):
        assert "has no record 'x'" in refused(*command, *campaign.options)
    assert "plans no job 'x'" in refused("train", "x", *campaign.options)
    assert "does not exist" in refused("train", "x/run.json", *campaign.options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "has no 'run'"),
        ('{"run": 3, "config": 4}', "run must be a table, got 3"),
        ("[" * 100_000, "nests brackets too deeply"),
        ('{"run": NaN}', "must hold finite numbers, got NaN"),
    ],
)
def test_a_run_file_that_no_worker_wrote_is_refused(refused: Refused, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert message in refused("train", "x.json")


@pytest.mark.parametrize(
    "arguments",
    [("run", "--jobs", "1000000000000"), ("train", "x", "--seeds", "0"), ("generate", "x", "--tokens", "-1")],
)
def test_an_option_out_of_range_is_refused_with_its_range(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert epochal(*arguments) == 2
    error = capsys.readouterr().err
    assert "Invalid value for" in error and "than or equal to" in error


def test_a_temperature_that_rounds_to_nothing_is_refused(refused: Refused, campaign: Campaign) -> None:
    name = one_record(campaign).job.name
    write_record(campaign.workspace, one_record(campaign))
    for value in ("1e-45", "nan", "inf", "-1", "0"):
        sentence = refused("generate", name, "--temperature", value, *campaign.options)
        assert "temperature must be a number from 0.001 to 1000, got" in sentence


def one_record(campaign: Campaign) -> Record:
    job = load_recipe("epoching").plan(Study(campaign.records, campaign.scale))[0]
    return Record(job, fingerprint(job), "done", {"loss": 3.0, "parameters": 5})


def test_a_record_of_another_job_with_the_same_name_is_refused(refused: Refused, campaign: Campaign) -> None:
    record = one_record(campaign)
    assert isinstance(record.job, Run)
    other = replace(record.job, clip_norm=7.0)
    write_record(campaign.workspace, replace(record, job=other, fingerprint=fingerprint(other)))
    for command in ("plan", "run", "report"):
        sentence = refused(command, "epoching", *campaign.options)
        assert "clip_norm" in sentence
        assert "delete" in sentence


def test_malformed_records_are_reported_and_left_out(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(campaign.workspace, one_record(campaign))
    path.with_name("half.json").write_text("{")
    assert epochal("plan", "epoching", *campaign.options) == 0
    out, err = capsys.readouterr()
    assert "1 done" in out
    assert err.splitlines()[0].startswith("left out: half.json: ")


# --- token stores -------------------------------------------------------------------------------------------------------


def test_a_missing_store_is_refused_where_it_is_read(refused: Refused, campaign: Campaign) -> None:
    name, _ = finished_run(campaign)
    store = campaign.workspace.data / "tiny"
    store.rename(store.with_name("elsewhere"))
    assert "epochal data" in refused("eval", name, *campaign.options)


@pytest.mark.parametrize("name", ["train.bin", "validation.lengths.npy", "meta.json", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_store_is_refused(refused: Refused, campaign: Campaign, name: str, damage: str) -> None:
    path = campaign.workspace.data / "tiny" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        half = len(content) // 2
        flipped = bytes([content[half] ^ 0xFF]) + content[half + 1 :]
        path.write_bytes(content[:half] + (flipped if damage == "flip" else b""))
    assert "tiny" in refused("run", "epoching", *campaign.options)


# --- damaged models ----------------------------------------------------------------------------------------------------


def finished_run(campaign: Campaign) -> tuple[str, Path]:
    """A record whose weights are a few bytes with checksums; nothing is trained."""
    record = one_record(campaign)
    model = campaign.workspace.folder(record.job.name) / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(100))
    write_checksums(campaign.workspace, record.job)
    meaning = {"fingerprint": record.fingerprint, "inputs": {}}
    (model.parent / "meaning.json").write_text(json.dumps(meaning))
    write_record(campaign.workspace, record)
    return record.job.name, model


@pytest.mark.parametrize("through", ["run", "ensemble"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "model.safetensors").write_bytes(bytes(99) + b"1"), "does not match its checksum"),
        (lambda model: (model / "model.safetensors").write_bytes(bytes(50)), "does not match its checksum"),
        (lambda model: (model / "model.safetensors").unlink(), "model/model.safetensors is missing"),
        (lambda model: (model.parent / "checksums.json").write_text("{"), "checksums.json cannot be read"),
        (lambda model: (model.parent / "checksums.json").write_text("[1]"), "checksums.json is not a table of hashes"),
        (lambda model: (model.parent / "checksums.json").write_text('{"model": 3}'), "is not a table of hashes"),
        (
            lambda model: ((model / "config.json").unlink(), (model / "config.json").mkdir()),
            "model/config.json is not a file",
        ),
    ],
    ids=["flipped", "cut", "missing", "half-checksums", "list", "number", "folder"],
)
def test_eval_generate_and_export_refuse_a_damaged_model(
    refused: Refused, campaign: Campaign, damage: Callable[[Path], object], message: str, through: str
) -> None:
    name, model = finished_run(campaign)
    damage(model)
    if through == "ensemble":
        job = Ensemble(name="both", runs=(name,), average="logits")
        results = {"loss": 3.0, "parameters": 5, "curve": {"1": [3.0]}, "members": 1}
        write_record(campaign.workspace, Record(job, fingerprint(job), "done", results))
        name = "both"
    for command in (["eval", name], ["generate", name], ["eval", name, "--tasks", "cloze"], ["export", name, "out"]):
        sentence = refused(*command, *campaign.options)
        assert message in sentence and str(model.parent) in sentence


def test_unreadable_checksums_are_damage_for_a_campaign_too(campaign: Campaign) -> None:
    name, model = finished_run(campaign)
    job = Samples(name="drawn", source=name, tokens=64, max_length=32)
    (model.parent / "checksums.json").write_text("[]")
    messages = quarantine_corrupt_inputs(job, campaign.records)
    assert len(messages) == 1 and "checksums.json is not a table of hashes" in messages[0] and not model.exists()
    assert quarantine_corrupt_inputs(job, campaign.records) == [], "the output is already aside"


# --- speed and ordinary use --------------------------------------------------------------------------------------------


def processor_seconds(*arguments: str) -> float:
    """Processor time of a new `epochal` process, which other work on the machine affects little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "epochal.cli", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def fast(limit: float, *arguments: str) -> bool:
    """Whether one of three processes stays below `limit` processor seconds."""
    return any(processor_seconds(*arguments) < limit for _ in range(3))


def test_help_answers_in_half_a_second() -> None:
    assert fast(0.5, "--help")


def test_a_thousand_records_add_less_to_a_plan_than_starting_it_costs(campaign: Campaign) -> None:
    record = one_record(campaign)
    path = write_record(campaign.workspace, record)
    alone = min(processor_seconds("plan", *campaign.options) for _ in range(2))
    table = json.loads(path.read_text())
    del table["checksum"]
    for number in range(999):
        table["job"]["name"] = f"other-{number}"
        path.with_name(f"other-{number}.json").write_text(json.dumps(table))
    assert len(campaign.records) == 1000
    assert min(processor_seconds("plan", *campaign.options) for _ in range(2)) < 2 * alone


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("data", "plan", "run", "report", "train", "eval", "generate", "export", "doctor"):
        assert epochal(command, "--help") == 0
        assert "Usage" in capsys.readouterr().out


def test_doctor_reports_the_error_and_the_remedy_of_a_failing_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor._check("a check", ["timeit", "-n1", "-r1", "pass"], {}, "do this")
    assert not doctor._check("a check", ["timeit", "-n1", "-r1", "raise KeyError(3)"], {}, "do this")
    assert capsys.readouterr().out.splitlines() == ["a check: works", "a check: FAILS (KeyError: 3); do this"]


def test_doctor_says_what_to_do() -> None:
    missing = doctor.next_steps(True, ["lm_eval", "submitit"], 2)
    assert missing[1] == "  only if you need downstream tasks, Slurm clusters: pip install lm-eval submitit"
    assert missing[2].endswith("epochal run --scale demo --jobs 2, then epochal report")
    assert doctor.next_steps(False, [], 2)[1:] == ["  correct what FAILS above, then run epochal doctor again"]


def test_plan_lists_jobs_and_changes_nothing(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(campaign.folder)
    assert epochal("plan", "epoching", *campaign.options, "--jobs") == 0
    out = capsys.readouterr().out
    assert "0 done" in out
    for job in load_recipe("epoching").plan(Study(campaign.records, campaign.scale)):
        assert f"ready    {job.name}" in out
    assert listing(campaign.folder) == before


def test_a_folder_that_cannot_be_created_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert epochal(*data_config(tmp_path, "a.txt", made_text().encode())[:2], "--work", str(tmp_path / "file")) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(tmp_path / "file") in err


# --- installation ---------------------------------------------------------------------------------------------------------


def test_help_texts_are_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert epochal("--help") == 0
    text = capsys.readouterr().out
    assert "--install-completion" in text and "doctor" in text
    assert "..." not in text.partition("Commands:")[2]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert epochal("--version") == 0
    assert capsys.readouterr().out == f"epochal {metadata.version('epochal')}\n"


def test_a_tracker_without_a_key_is_refused_at_the_start(
    refused: Refused, campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine elsewhere login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "run wandb login" in refused("run", *campaign.options, "--tracker", "wandb")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert cli._trackers(["wandb", "none"]) == ("wandb",)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert cli._trackers(["wandb"]) == ("wandb",)


def test_an_unreachable_hub_is_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not go_offline_if_unreachable()
    # Now nothing listens there.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1" and sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE is True  # type: ignore[attr-defined]
    assert capsys.readouterr().err == "epochal: 127.0.0.1 cannot be reached, so only its cached files are used.\n"


def test_a_campaign_whose_text_is_on_an_unreachable_hub_fails_at_once(
    campaign: Campaign, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    (campaign.folder / "a.txt").write_text(made_text())
    config = campaign.folder / "far.toml"
    config.write_text(DATA.format(corpus=campaign.folder / "a.txt").replace("train = 300", 'path = "owner/name"'))
    campaign.rewrite(campaign.scale.data, str(config))
    assert epochal("run", "epoching", *campaign.options) == 2
    reached, refused = capsys.readouterr().err.splitlines()
    assert reached == "epochal: 127.0.0.1 cannot be reached, so only its cached files are used."
    assert "owner/name" in refused


def test_cores_are_counted_where_no_process_is_bound_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5, 2}, raising=False)
    assert usable_cores() == [2, 5]
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    assert usable_cores() == [0, 1, 2]


def test_the_wheel_carries_what_commands_need() -> None:
    """The list of its files, without building it."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    files = {str(file.distribution_path) for file in builder.WheelBuilder(str(REPOSITORY)).recurse_included_files()}
    for folder, pattern in (("recipes", "*.py"), ("launch", "*.py"), ("configs", "*/*")):
        for path in (REPOSITORY / folder).glob(pattern):
            assert f"epochal/built_in/{path.relative_to(REPOSITORY)}" in files
    modules = [path.relative_to(REPOSITORY / "src") for path in (REPOSITORY / "src" / "epochal").rglob("*.py")]
    assert {*map(str, modules), "triton_kernels/softmax_loss.py"} <= files
    assert not [name for name in files if "/results/" in name or name.startswith("tests")]
