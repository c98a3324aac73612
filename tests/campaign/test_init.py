"""`epochal init` writes configs that load, fit the time and are explained; a failure leaves nothing."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from campaigns import made_text

from epochal.campaign.init import Request, init
from epochal.campaign.plan import campaign_jobs, recipe_names
from epochal.data.prepare import prepare
from epochal.records import Records, Workspace
from epochal.run import Run
from epochal.scale import load_scale

PARAMETERS = {"w16": 4e4, "w32": 1e5, "w64": 3e5, "w96": 6e5, "w128": 1e6, "w192": 2e6}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a machine of two cores and 1e10 FLOP/s each."""

    def speeds(models: Iterable[str], *, threads: int, **_: object) -> dict[str, float]:
        return {model: 1e10 * threads**0.5 / (6 * PARAMETERS[model]) for model in models}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("epochal.training.speed.training_speeds", speeds)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    return tmp_path


def request(*files: str, minutes: float = 10.0) -> Request:
    return Request(name="mine", files=files, seconds=60 * minutes, device="cpu", work=Path("work"))


def test_the_written_campaign_loads_and_every_job_of_it_has_its_inputs(folder: Path) -> None:
    (folder / "texts").mkdir()
    for number, story in enumerate(made_text().split("\n--\n")):
        (folder / "texts" / f"{number}.md").write_text(story)
    lines = init(request("texts"))
    scale = load_scale("mine")
    store = prepare("mine", Path("work") / "data")
    assert scale.unique_tokens[0] <= store.meta["tokens"]["train"] < 1.2 * scale.unique_tokens[0]
    assert recipe_names(scale) == ["controls", "best_model"]
    jobs = campaign_jobs(recipe_names(scale), Records(Workspace("mine")), scale)
    assert {job.epochs for job in jobs if isinstance(job, Run)} > {1}, "the control is one pass, the proxy is more"
    text = "\n".join(lines)
    for word in ("training tokens", "Text is the limit", "Batch", "Control", "Cost: about", "epochal run --scale mine"):
        assert word in text


def test_less_time_gives_a_smaller_campaign(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(made_text().split("\n--\n")))
    init(request("a.txt", minutes=0.003))
    settings = load_scale("mine").tables["best_model"]
    assert settings["members"] == 1 and "student_epochs" not in settings


def test_a_text_of_one_document_is_split_at_blank_lines(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(made_text().split("\n--\n")))
    init(request("a.txt"))
    assert 'separator = ""' in Path("configs/data/mine.toml").read_text()
    assert prepare("mine", Path("work") / "data").meta["documents"]["train"] > 20


def test_one_document_without_blank_lines_is_cut_into_pieces(folder: Path) -> None:
    (folder / "a.txt").write_text("\n".join(line for line in made_text().split("\n") if line.strip("-")) * 20)
    lines = init(request("a.txt"))
    assert any("pieces of at most 2,000 characters" in line for line in lines)
    documents = prepare("mine", Path("work") / "data").meta["documents"]
    assert all(documents[split] for split in ("train", "validation", "test"))


def test_a_short_text_holds_out_enough_for_sequences_of_validation(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(made_text().split("\n--\n"))[:14_000])
    init(request("a.txt"))
    tokens = prepare("mine", Path("work") / "data").meta["tokens"]
    assert min(tokens["validation"], tokens["test"]) > load_scale("mine").sequence_length


@pytest.mark.parametrize(
    ("files", "minutes", "message"),
    [
        (("nothing.txt",), 10.0, "matches no file"),
        (("empty.txt",), 10.0, "has no text"),
        (("short.txt",), 10.0, "has no documents"),
        (("few.txt",), 10.0, "a sequence has 128; give more text"),
        (("a.txt",), 1e-9, "give more time"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_config(
    folder: Path, files: tuple[str, ...], minutes: float, message: str
) -> None:
    (folder / "empty.txt").write_text("\n")
    (folder / "short.txt").write_text("one line")
    (folder / "few.txt").write_text("\n\n".join(f"{number} words" for number in range(60)))
    (folder / "a.txt").write_text("\n\n".join(made_text().split("\n--\n")))
    with pytest.raises(ValueError, match=message):
        init(request(*files, minutes=minutes))
    assert not list(folder.glob("configs/*/*.toml"))


def test_configs_of_a_user_are_replaced_only_on_request(folder: Path) -> None:
    (folder / "a.txt").write_text("\n\n".join(made_text().split("\n--\n")))
    init(request("a.txt"))
    with pytest.raises(ValueError, match="exists; choose another name"):
        init(request("a.txt"))
    init(request("a.txt"), force=True)
