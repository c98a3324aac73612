"""The first screen of a report: best models, what they cost, how sure that is, the next step."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from epochal.records import Record, Records, Workspace
from epochal.report.claims import Claim, verdict, without_paper
from epochal.report.html import render_html
from epochal.report.markdown import render_markdown
from epochal.report.overview import hours_text, losses_in_words, overview, sampled_text
from epochal.report.sections import Section
from epochal.run import AdamW, Ensemble, Run, Samples, SequenceDistillation, fingerprint
from epochal.scaling import interval_text, seed_interval

TEXT = {"tokens": 1000, "documents": 7, "vocab_size": 50, "bytes_per_token": 3.0, "unigram_loss": 3.5}
BASE = Run(
    name="a",
    model="w16",
    data="kjv",
    unique_tokens=256,
    epochs=1,
    batch_size=4,
    sequence_length=32,
    optimizer=AdamW(lr=0.01),
)
MEMBERS = [replace(BASE, name=name, init_seed=seed) for seed, name in enumerate("abc")]
STUDENT = replace(BASE, name="s", distill=SequenceDistillation(samples="text", fraction=0.5))
SAMPLES = Samples(name="text", source="e", tokens=64, max_length=32)
CONTROL = replace(BASE, name="one-pass", unique_tokens=896)


def record(job, loss, hours=None, **results):
    return Record(
        job, fingerprint(job), "done", {"loss": loss, **results}, provenance={"hours": hours} if hours else {}
    )


def campaign():
    """Three members of 10 parameters and 1 hour each, their ensemble, its text, a student of half an hour."""
    members = [record(job, 4.0 + job.init_seed / 10, 1.0, parameters=10, text=TEXT) for job in MEMBERS]
    ensemble = Ensemble(name="e", runs=("a", "b"), average="logits")
    return Records(
        Workspace("demo"),
        [
            *members,
            record(ensemble, 3.5, parameters=20),
            record(SAMPLES, None),
            record(STUDENT, 3.8, 0.5, parameters=10),
            record(CONTROL, 3.6, 0.2, parameters=10, text=TEXT),
        ],
    )


def of(records, *sections, **names):
    roles = {role: records.named(name) for role, name in names.items()}
    return overview(records, roles, sections, scale="demo")


def test_a_model_has_its_size_the_hours_of_all_it_is_made_from_and_its_command():
    shown = of(campaign(), student="s", ensemble="e", single="a")
    single, ensemble, student = shown.models
    assert [model.what for model in shown.models] == ["Best single model", "Best ensemble", "Best student"]
    assert (single.parameters, ensemble.parameters, student.parameters) == (10, 20, 10)
    # The student's hours are its own, and those of both members that its text is from.
    assert (single.hours, ensemble.hours, student.hours) == (1.0, 2.0, 2.5)
    assert student.command == "epochal export student exported --scale demo"
    assert losses_in_words(shown.models) == "Lowest loss: best ensemble, 3.5000 nats per token."


def test_bits_per_byte_are_there_where_records_have_the_bytes_per_token():
    single, ensemble, student = of(campaign(), single="a", ensemble="e", student="s").models
    assert single.bits_per_byte == pytest.approx(4.0 / math.log(2) / 3)
    assert ensemble.bits_per_byte == pytest.approx(3.5 / math.log(2) / 3)
    assert student.bits_per_byte is None


def test_other_seeds_say_how_sure_a_loss_is():
    single, ensemble = of(campaign(), single="a", ensemble="e").models
    assert single.sure == f"3 seeds: mean 4.1000, 90% {interval_text(seed_interval([4.0, 4.1, 4.2]))}"
    assert "not repeated" in ensemble.sure


def test_the_share_of_the_text_is_that_of_the_campaign_not_of_its_control():
    regime = of(campaign(), control="one-pass", single="a").regime
    assert regime.startswith("D = 256 tokens, 25.6% of the text's 1,000 tokens of 7 documents.")


def test_best_is_shown_once():
    names = [model.what for model in of(campaign(), best="e", ensemble="e", single="a").models]
    assert names == ["Best single model", "Best ensemble"]


@pytest.mark.parametrize(
    ("names", "claims", "sentence"),
    [
        ({"control": "one-pass", "single": "a"}, (), "One pass over the text is the best model here"),
        ({"single": "a"}, (), "There is no best ensemble and no best student yet: `epochal run --scale demo`."),
        (
            {"single": "a", "ensemble": "e", "student": "s"},
            (Claim(text="t", value="", holds=True, interval=(1, 2), provisional=("w16 lacks a neighbor",)),),
            "Most common reservation (one claim): w16 lacks a neighbor.",
        ),
        ({"single": "a", "ensemble": "e", "student": "s"}, (), "Nothing is missing"),
    ],
)
def test_the_next_step_follows_from_what_is_there(names, claims, sentence):
    assert of(campaign(), Section(title="S", question="?", claims=claims), **names).next_step.startswith(sentence)


def test_markdown_and_page_begin_with_the_best_models():
    shown = of(campaign(), single="a", ensemble="e")
    markdown = render_markdown([], title="T", overview=shown)
    assert "| Best ensemble | 3.5000 |" in markdown and markdown.index("Best ensemble") < markdown.index("All claims")
    page = render_html([], {}, title="T", overview=replace(shown, sample="<In the beginning>"))
    assert "&lt;In the beginning&gt;" in page and page.count('class="model lowest"') == 1


def test_a_campaign_that_replicates_nothing_judges_its_own_claims():
    claim = Claim(text="t", value="", holds=True, seeds=3, paper="0.3 nats", sizes=(1.0, 2.0))
    assert verdict(claim) == "reproduced"
    assert verdict(without_paper(claim)) == "holds" and without_paper(claim).paper == ""


@pytest.mark.parametrize(("hours", "shown"), [(None, "–"), (2.0, "2.0 h"), (0.5, "30 min"), (0.01, "36 s")])
def test_hours_below_one_are_minutes_or_seconds(hours, shown):
    assert hours_text(hours) == shown


def test_a_sample_is_decoded_where_its_tokens_are_on_this_disk(tmp_path):
    space = Workspace("x", tmp_path / "results", tmp_path / "work")
    records = Records(space, [record(SAMPLES, None)])
    assert sampled_text(records, "kjv") == ""
    (space.data / "kjv" / "tokenizer").mkdir(parents=True)
    Tokenizer(WordLevel({"In": 0, "the": 1}, unk_token="the")).save(
        str(space.data / "kjv" / "tokenizer" / "tokenizer.json")
    )
    folder = space.folder("text")
    folder.mkdir(parents=True)
    np.save(folder / "samples.npy", np.array([0, 1, 0], dtype=np.uint16))
    # Tokens that another job left are not this campaign's.
    assert sampled_text(records, "kjv") == ""
    (folder / "meaning.json").write_text(json.dumps({"fingerprint": fingerprint(SAMPLES), "inputs": {}}))
    assert sampled_text(records, "kjv") == "In the In"
