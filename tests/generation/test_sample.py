"""Sampled text against a loop without a cache, and exact token counts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from epochal.data.store import TokenStore
from epochal.generation.sample import _ends, continue_documents, draw, prompts, sample, sample_texts
from epochal.models.llama import build_model
from epochal.records import Record, Records, Workspace
from epochal.run import Ensemble, Run, Samples, fingerprint

VOCABULARY, BOS, EOS = 24, 0, 1


def model(seed: int = 0, vocabulary: int = VOCABULARY, context: int = 256) -> Any:
    """A random model with a sharper head, so that its predictions depend on the context."""
    network = build_model(
        "w16", vocab_size=vocabulary, max_positions=context, seed=seed, bos_token_id=BOS, eos_token_id=EOS
    ).eval()
    with torch.no_grad():
        network.lm_head.weight.mul_(3.0)
    return network


def job(**changes: Any) -> Samples:
    return Samples(**{"name": "s", "source": "a", "tokens": 500, "max_length": 40, **changes})


@torch.no_grad()
def without_cache(subject: Any, samples: Samples, batch: int, context: int, seed: int, texts: int) -> list[list[int]]:
    """The same texts from forward passes over the whole window, without a cache."""
    generator = torch.Generator().manual_seed(seed)
    half, finished_texts = context // 2, []
    while len(finished_texts) < texts:
        rows = [[BOS] for _ in range(batch)]
        while rows and len(rows[0]) < samples.max_length:
            begin = max(0, len(rows[0]) - half)
            count = min(context - (len(rows[0]) - begin), samples.max_length - len(rows[0]))
            for _ in range(count):
                window = torch.tensor([row[begin:] for row in rows])
                logits = subject(input_ids=window, use_cache=False).logits[:, -1]
                chosen = torch.multinomial(torch.softmax(logits / samples.temperature, -1), 1, generator=generator)
                for row, token in zip(rows, chosen[:, 0].tolist(), strict=True):
                    row.append(token)
            done = [row for row in rows if EOS in row or len(row) >= samples.max_length]
            finished_texts += [row[: row.index(EOS) + 1] if EOS in row else row for row in done]
            rows = [row for row in rows if row not in done]
    return finished_texts[:texts]


@pytest.mark.parametrize(("context", "max_length"), [(64, 40), (16, 50), (10, 10)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_with_a_cache_equals_sampling_without(context: int, max_length: int, temperature: float) -> None:
    samples, subject = job(max_length=max_length, temperature=temperature), model()
    texts = draw(subject, samples, 8, context=context, bos=BOS, eos=EOS, generator=torch.Generator().manual_seed(3))
    sampled = [next(texts).tolist() for _ in range(20)]
    assert sampled == without_cache(subject, samples, 8, context, 3, 20)
    assert max(map(len, sampled)) > min(context, max_length - 1), "some text ran beyond the context, or to its end"


def test_texts_start_with_bos_and_end_with_eos_or_at_max_length() -> None:
    samples = job(max_length=30)
    texts = draw(model(), samples, 64, context=16, bos=BOS, eos=EOS, generator=torch.Generator().manual_seed(0))
    lengths = set()
    for _ in range(400):
        text = next(texts).tolist()
        assert text[0] == BOS and len(text) <= 30
        assert EOS not in text[:-1]
        assert text[-1] == EOS or len(text) == 30
        lengths.add(len(text))
    assert len(lengths) > 10


def test_first_tokens_follow_the_distribution_of_the_model() -> None:
    subject = model()
    with torch.no_grad():
        expected = torch.softmax(subject(input_ids=torch.tensor([[BOS]])).logits[0, -1], -1).double()
    texts = draw(
        subject, job(max_length=2), 250, context=16, bos=BOS, eos=EOS, generator=torch.Generator().manual_seed(0)
    )
    draws = 4000
    counts = np.bincount([next(texts)[1] for _ in range(draws)], minlength=VOCABULARY)
    spread = (expected * (1 - expected) / draws).sqrt()
    assert (np.abs(counts / draws - expected.numpy()) < 5 * spread.numpy()).all()


def finished(space: Workspace, store: TokenStore, run: Run, seed: int) -> Record:
    model(seed, store.vocab_size, run.sequence_length).save_pretrained(space.folder(run.name) / "model")
    return Record(run, fingerprint(run), "done", {"loss": 3.0, "parameters": 1})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, TokenStore, list[Record]]:
    """Two finished members and their ensemble."""
    space, store, config = tiny.workspace(tmp_path_factory.mktemp("shared"))
    members = [finished(space, store, tiny.run(config, name=name), seed) for seed, name in enumerate("ab")]
    both = Ensemble(name="both", runs=("a", "b"), average="logits")
    return space, store, [*members, Record(both, fingerprint(both), "done", {"loss": 3.0})]


@pytest.fixture
def campaign(
    tmp_path: Path, shared: tuple[Workspace, TokenStore, list[Record]]
) -> tuple[Workspace, TokenStore, Records]:
    """A copy of `shared` that a test may change."""
    space = Workspace("tiny", tmp_path / "results", tmp_path / "work")
    shutil.copytree(shared[0].work, space.work)
    return space, shared[1], Records(space, shared[2])


def test_token_counts_are_exact(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, store, records = campaign
    for tokens in (1, 500, 1001):
        record = sample(job(tokens=tokens), space, records)
        written = np.load(space.folder("s") / "samples.npy")
        assert written.dtype == np.dtype(store.meta["dtype"])
        assert len(written) == tokens == record.results["tokens"]
        assert written[0] == store.meta["bos"] and written.max() < store.vocab_size
        assert record.results["texts"] == (written == store.meta["bos"]).sum() >= 1
        assert record.inputs == {"a": records.named("a").fingerprint}  # type: ignore[union-attr]
    assert sorted(path.name for path in space.folder("s").iterdir()) == ["aside", "meaning.json", "samples.npy"]


def test_members_of_an_ensemble_contribute_equal_shares(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, _, records = campaign
    record = sample(job(tokens=601, source="both"), space, records)
    both = np.load(space.folder("s") / "samples.npy")
    sample(job(tokens=300), space, records)
    alone = np.load(space.folder("s") / "samples.npy")
    assert len(both) == 601 and record.results["members"] == 2
    assert np.array_equal(both[:300], alone), "the first member samples as it does alone"
    assert set(record.inputs) == {"a", "b"}


def test_members_contribute_in_proportion_to_their_weights(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, _, records = campaign

    def alone(tokens: int) -> Any:
        sample(job(tokens=tokens), space, records)
        return np.load(space.folder("s") / "samples.npy")

    def drawn(*weights: float) -> tuple[Any, Record]:
        uneven = Ensemble(name="uneven", runs=("a", "b"), average="logits", member_weights=weights)
        known = Records(space, [*records, Record(uneven, fingerprint(uneven), "done", {"loss": 3.0})])
        record = sample(job(tokens=601, source="uneven"), space, known)
        return np.load(space.folder("s") / "samples.npy"), record

    uneven, record = drawn(0.25, 0.75)
    assert len(uneven) == 601 and np.array_equal(uneven[:150], alone(150))
    assert uneven[150] == uneven[0] == BOS
    assert set(record.inputs) == {"uneven", "a", "b"}, "the samples depend on the weights"
    sample(job(tokens=601, source="both"), space, records)
    assert np.array_equal(drawn(0.5, 0.5)[0], np.load(space.folder("s") / "samples.npy"))
    (space.folder("b") / "model").rename(space.folder("b") / "moved")  # a member with weight 0 is not loaded
    assert np.array_equal(drawn(1.0, 0.0)[0], alone(601))


def test_shares_are_exact_when_weights_do_not_sum_to_one_in_binary(
    campaign: tuple[Workspace, TokenStore, Records],
) -> None:
    space, _, records = campaign
    three = Ensemble(name="three", runs=("a", "b", "c"), average="logits", member_weights=(0.6, 0.3, 0.1))
    known = Records(space, [*records, Record(three, fingerprint(three), "done", {"loss": 3.0})])
    assert _ends(job(tokens=1000, source="three"), 3, known) == [600, 900, 1000]


def test_identical_members_and_different_seeds_give_different_texts(
    campaign: tuple[Workspace, TokenStore, Records],
) -> None:
    space, _, records = campaign
    shutil.copytree(space.folder("a") / "model", space.folder("twin") / "model")
    twin = replace(records.named("a").job, name="twin")  # type: ignore[union-attr, type-var]
    pair = Ensemble(name="pair", runs=("a", "twin"), average="logits")
    known = Records(space, [*records, *(Record(j, fingerprint(j), "done", {"loss": 3.0}) for j in (twin, pair))])
    texts = set()
    for seed in (0, 1):
        sample(job(tokens=200, source="pair", seed=seed), space, known)
        tokens = np.load(space.folder("s") / "samples.npy")
        texts |= {tuple(tokens[:100]), tuple(tokens[100:])}
    assert len(texts) == 4


def test_a_full_disk_leaves_the_previous_samples(
    campaign: tuple[Workspace, TokenStore, Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    space, _, records = campaign
    sample(job(), space, records)
    before = (space.folder("s") / "samples.npy").read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        sample(job(), space, records)
    assert (space.folder("s") / "samples.npy").read_bytes() == before
    assert sorted(path.name for path in space.folder("s").iterdir()) == ["meaning.json", "samples.npy"]


@pytest.mark.parametrize("weights", [None, (0.75, 0.25)])
def test_an_average_of_parameters_samples_from_the_mean_model(
    campaign: tuple[Workspace, TokenStore, Records], weights: tuple[float, ...] | None
) -> None:
    space, store, records = campaign
    soup = Ensemble(name="soup", runs=("a", "b"), average="parameters", member_weights=weights)
    records = Records(space, [*records, Record(soup, fingerprint(soup), "done", {"loss": 3.0})])
    sample(job(tokens=100, source="soup", draw="average"), space, records)
    sampled = np.load(space.folder("s") / "samples.npy")
    mean, other = model(0, store.vocab_size, 32), model(1, store.vocab_size, 32)
    with torch.no_grad():
        for mine, its in zip(mean.parameters(), other.parameters(), strict=True):
            mine.lerp_(its, 0.5 if weights is None else weights[1])
    bos, eos = int(store.meta["bos"]), int(store.meta["eos"])
    generator = torch.Generator().manual_seed(0)
    texts = draw(mean, job(), 3, context=32, bos=bos, eos=eos, generator=generator)
    expected: list[int] = []
    while len(expected) < 100:
        expected += next(texts).tolist()
    assert sampled.tolist() == expected[:100]


@pytest.mark.parametrize("average", ["logits", "probs"])
def test_sampling_the_average_follows_the_averaged_distribution(
    campaign: tuple[Workspace, TokenStore, Records], average: str
) -> None:
    """First tokens follow the averaged distribution, written out in float64."""
    space, store, records = campaign
    mixed = Ensemble(name="mixed", runs=("a", "b"), average=average, member_weights=(0.8, 0.2))
    records = Records(space, [*records, Record(mixed, fingerprint(mixed), "done", {"loss": 3.0})])
    bos, draws = int(store.meta["bos"]), 4000
    with torch.no_grad():
        logits = [
            model(seed, store.vocab_size, 32).double()(input_ids=torch.tensor([[bos]])).logits[0, -1] for seed in (0, 1)
        ]
    if average == "logits":
        expected = torch.softmax(0.8 * logits[0] + 0.2 * logits[1], -1).numpy()
    else:
        expected = (0.8 * torch.softmax(logits[0], -1) + 0.2 * torch.softmax(logits[1], -1)).numpy()
    record = sample(job(tokens=2 * draws, max_length=2, source="mixed", draw="average"), space, records)
    first = np.load(space.folder("s") / "samples.npy").reshape(draws, 2)[:, 1]
    counts = np.bincount(first, minlength=store.vocab_size)
    cells = expected * draws >= 5
    chi_square = ((counts - expected * draws)[cells] ** 2 / (expected * draws)[cells]).sum()
    assert chi_square < cells.sum() + 5 * (2 * cells.sum()) ** 0.5
    assert set(record.inputs) == {"mixed", "a", "b"}


def test_samples_depend_on_the_seed_alone(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, _, records = campaign
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(drawn))
        sample(job(seed=seed), space, records)
        drawn.append(np.load(space.folder("s") / "samples.npy"))
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_sample_texts_returns_strings_and_writes_no_file(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, _, records = campaign
    texts = sample_texts(job(tokens=100), space, records)
    assert texts and all(isinstance(text, str) for text in texts)
    assert not space.folder("s").exists()


def test_sources_without_a_model_raise(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, _, records = campaign
    with pytest.raises(ValueError, match="'c' has no record; run it first"):
        sample(job(source="c"), space, records)
    text = Samples(name="t", source="a", tokens=1, max_length=2)
    with_text = Records(space, [*records, Record(text, fingerprint(text), "done", {})])
    with pytest.raises(ValueError, match="is Samples, not a model"):
        sample(job(source="t"), space, with_text)
    (space.folder("a") / "model").rename(space.folder("a") / "moved")
    with pytest.raises(ValueError, match="does not exist; run 'a' again"):
        sample(job(), space, records)


# --- continued documents ------------------------------------------------------------------------------------------------


def continued(subject: Any, documents: np.ndarray[Any, Any], tokens: int, **changes: Any) -> list[list[int]]:
    samples = job(prompt_tokens=documents.shape[1], max_length=14, **changes)
    generator = torch.Generator().manual_seed(3)
    texts = continue_documents(subject, samples, documents, tokens, context=32, eos=EOS, generator=generator)
    return [text.tolist() for text in texts]


def test_stretched_documents_are_the_separate_ones_joined() -> None:
    documents = np.array([[BOS, 5, 6], [BOS, 7, 8], [BOS, 9, 10]])
    apart = continued(model(), documents, 300, continuations=4)
    joined = continued(model(), documents, 300, continuations=4, joined=True)
    count = len(joined)
    assert len(apart) == 4 * count and count % 3 == 64 % 3
    assert [text[:3] for text in apart[:3]] == documents.tolist(), "each continues the next document"
    assert any(EOS in text for text in apart) and all(text[-1] == EOS or len(text) == 14 for text in apart)
    for number, long in enumerate(joined):
        # Those of one document are `count` texts apart.
        texts = apart[number::count]
        assert {tuple(text[:3]) for text in texts} == {tuple(documents[number % 3])}
        inner = [text[1:-1] if text[-1] == EOS else text[1:] for text in texts]
        end = [EOS] if texts[-1][-1] == EOS else []
        assert long == [BOS, *(token for part in inner for token in part), *end]


def test_continuations_follow_the_distribution_of_the_model() -> None:
    subject, document = model(), np.array([[BOS, 5, 6]])
    texts = continued(subject, document, 20000, continuations=256)
    with torch.no_grad():
        expected = subject(torch.from_numpy(document)).logits[0, -1].softmax(-1).numpy()
    counts = np.bincount([text[3] for text in texts], minlength=VOCABULARY)
    error = np.abs(counts / counts.sum() - expected).max()
    assert error < 4 * (0.25 / counts.sum()) ** 0.5, f"the first continued token is off by {error}"


def test_documents_too_short_for_a_prompt_are_left_out(campaign: tuple[Workspace, TokenStore, Records]) -> None:
    space, store, records = campaign
    run = next(record.job for record in records if isinstance(record.job, Run))
    stream = store.training_stream(run)
    lengths = np.diff(np.append(stream.starts, len(stream.tokens)))
    limit = int(np.median(lengths))
    begun = prompts(store, run, limit)
    assert len(begun) == (lengths >= limit).sum() and (begun[:, 0] == store.meta["bos"]).all()
    with pytest.raises(ValueError, match="has 100000 tokens to continue; use fewer prompt_tokens"):
        prompts(store, run, 100000)
    samples = job(source=run.name, tokens=400, max_length=24, prompt_tokens=8, continuations=2, joined=True)
    assert sample(samples, space, records).results["tokens"] == 400


def test_continuations_need_a_prompt() -> None:
    with pytest.raises(ValueError, match="prompt_tokens is 0; give the tokens of a prompt"):
        job(continuations=2)
    with pytest.raises(ValueError, match="prompt_tokens 40 leaves nothing to draw in texts of 40 tokens"):
        job(prompt_tokens=40)
