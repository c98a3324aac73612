"""The order of training text: permutations, random access, and exact fractions of sampled text."""

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny

from epochal.data.store import Batches, Stream, Tokens, TokenStore, sampled_stream
from epochal.run import SequenceDistillation

T = 8
STARTS = np.asarray([0, 3, 4, 20, 21, 40, 57])
TOKENS = np.arange(64, dtype=np.uint16)  # every token is its own position


def stream(order: str, seed: int = 0) -> Stream:
    return Stream(TOKENS, STARTS, T, order, seed)


def naive_epoch(tokens: Tokens, starts: Tokens, length: int, order: str, seed: int, epoch: int) -> list[list[int]]:
    """One epoch by its definition."""
    if order == "documents":
        bounds = [*starts.tolist(), len(tokens)]
        documents = [tokens[begin:end].tolist() for begin, end in pairwise(bounds)]
        permutation = np.random.default_rng([seed, epoch]).permutation(len(documents))
        packed = [token for index in permutation for token in documents[index]]
        return [packed[begin : begin + length] for begin in range(0, len(packed) - length + 1, length)]
    cut = [tokens[begin : begin + length].tolist() for begin in range(0, len(tokens) - length + 1, length)]
    permutation = np.random.default_rng([seed, 0 if order == "fixed" else epoch]).permutation(len(cut))
    return [cut[index] for index in permutation]


@pytest.mark.parametrize("order", ["documents", "sequences", "fixed"])
@pytest.mark.parametrize("seed", [0, 7])
def test_epochs_equal_the_naive_reference(order: str, seed: int) -> None:
    text = stream(order, seed)
    count = text.sequences_per_epoch
    for epoch in range(4):
        rows = [text.sequence(epoch * count + position).tolist() for position in range(count)]
        assert rows == naive_epoch(TOKENS, STARTS, T, order, seed, epoch)
        assert sorted(token for row in rows for token in row) == TOKENS.tolist(), (
            "every token must occur once per epoch"
        )


def test_documents_stay_whole_and_are_permuted_in_each_epoch() -> None:
    text = stream("documents")
    seen = []
    for epoch in range(3):
        flat = np.concatenate([text.sequence(epoch * 8 + position) for position in range(8)]).tolist()
        for begin, end in zip(STARTS, [*STARTS[1:], 64], strict=True):
            place = flat.index(begin)
            assert flat[place : place + end - begin] == list(range(begin, end))
        seen.append(flat)
    assert seen[0] != seen[1] != seen[2]


def test_fixed_order_repeats_and_sequences_order_reshuffles() -> None:
    for order, same in (("fixed", True), ("sequences", False)):
        text = stream(order)
        epochs = [[text.sequence(epoch * 8 + position).tolist() for position in range(8)] for epoch in range(3)]
        assert (epochs[0] == epochs[1] == epochs[2]) == same
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]), "the sequences must stay the same"


def test_another_seed_gives_another_order() -> None:
    for order in ("documents", "sequences", "fixed"):
        one, other = ([stream(order, seed).sequence(i).tolist() for i in range(8)] for seed in (0, 1))
        assert one != other


@pytest.mark.parametrize("order", ["documents", "sequences", "fixed"])
def test_random_access_equals_sequential_access(order: str) -> None:
    sequential = Batches(stream(order), None, 0.0, 4)
    expected = [sequential(step) for step in range(12)]
    jumping = Batches(stream(order), None, 0.0, 4)
    for step in np.random.default_rng(0).permutation(12):
        assert np.array_equal(jumping(int(step)), expected[step])
        assert np.array_equal(Batches(stream(order), None, 0.0, 4)(int(step)), expected[step])
    assert expected[0].dtype == np.int64 and expected[0].shape == (4, T)


@pytest.fixture
def store_and_config(tmp_path: Path) -> tuple[TokenStore, Path]:
    _, store, config = tiny.workspace(tmp_path)
    return store, config


def test_all_seeds_share_the_first_tokens(store_and_config: tuple[TokenStore, Path]) -> None:
    store, config = store_and_config
    everything = store.tokens("train")
    for unique in (128, 1024, 2048):
        subsets = [
            store.training_stream(
                tiny.run(config, unique_tokens=unique, order_seed=seed, init_seed=seed, data_order=order)
            )
            for seed in range(3)
            for order in ("documents", "sequences", "fixed")
        ]
        for subset in subsets:
            assert np.array_equal(subset.tokens, everything[:unique])
            ends = np.cumsum(store.lengths("train"))
            assert subset.starts.tolist() == [0, *(end for end in ends if end < unique)]


def test_batches_equal_the_naive_reference(store_and_config: tuple[TokenStore, Path]) -> None:
    store, config = store_and_config
    run = tiny.run(config, order_seed=3)
    batches = Batches(store.training_stream(run), None, 0.0, run.batch_size)
    tokens = store.tokens("train")[: run.unique_tokens]
    ends = np.cumsum(store.lengths("train"))
    starts = np.concatenate([[0], ends[ends < run.unique_tokens]])
    rows = [row for epoch in range(2) for row in naive_epoch(tokens, starts, 32, "documents", 3, epoch)]
    for step in range(2 * run.steps_per_epoch):
        assert batches(step).tolist() == rows[step * 4 : step * 4 + 4]


def test_a_budget_or_sequence_longer_than_the_text_is_refused(store_and_config: tuple[TokenStore, Path]) -> None:
    store, config = store_and_config
    with pytest.raises(ValueError, match=r"unique_tokens 128000000 is above the \d+ training tokens of tiny; use at"):
        store.training_stream(tiny.run(config, unique_tokens=128_000_000))
    with pytest.raises(ValueError, match="sequence_length 1000000 is longer than the validation split"):
        store.sequences("validation", 1_000_000)
    held_out = store.sequences("validation", 32)
    assert np.array_equal(held_out.ravel(), store.tokens("validation")[: held_out.size])
    assert 0 <= len(store.tokens("validation")) - held_out.size < 32


@pytest.mark.parametrize("fraction", [Fraction(1, 2), Fraction(3, 4), Fraction(9, 10), Fraction(1, 10), Fraction(1, 3)])
def test_sampled_text_has_its_exact_fraction_at_every_prefix(fraction: Fraction) -> None:
    sampled = Stream(TOKENS + 1000, STARTS, T, "documents", 5)
    batches = Batches(stream("documents"), sampled, float(fraction), 4)
    rows = np.concatenate([batches(step) for step in range(100)])
    is_real = rows[:, 0] < 1000
    assert (is_real == (rows < 1000).all(axis=1)).all(), "a row must not mix real and sampled text"
    for count in range(1, len(rows) + 1):
        assert is_real[:count].sum() == count * (1 - fraction) // 1
    real, drawn = stream("documents"), Stream(TOKENS + 1000, STARTS, T, "documents", 5)
    assert rows[is_real].tolist() == [real.sequence(i).tolist() for i in range(is_real.sum())]
    assert rows[~is_real].tolist() == [drawn.sequence(i).tolist() for i in range((~is_real).sum())]


def test_a_distilled_run_reads_all_epochs_of_real_text(store_and_config: tuple[TokenStore, Path]) -> None:
    store, config = store_and_config
    run = replace(tiny.run(config), distill=SequenceDistillation(samples="s", fraction=0.75))
    assert run.steps == 4 * 48
    sampled = sampled_stream(np.full(400, store.meta["bos"], dtype=np.uint16), store.meta["bos"], run)
    batches = Batches(store.training_stream(run), sampled, 0.75, run.batch_size)
    rows = np.concatenate([batches(step) for step in range(run.steps)])
    real = (rows != store.meta["bos"]).any(axis=1)
    assert real.sum() * run.sequence_length == run.unique_tokens * run.epochs


def test_sampled_documents_start_at_each_start_token(store_and_config: tuple[TokenStore, Path]) -> None:
    _, config = store_and_config
    run = tiny.run(config)
    tokens = np.ones(100, dtype=np.uint16)
    tokens[[0, 30, 77]] = 0
    assert sampled_stream(tokens, 0, run).starts.tolist() == [0, 30, 77]
    assert sampled_stream(tokens[5:], 0, run).starts.tolist() == [0, 25, 72]
    with pytest.raises(ValueError, match="do not fill one sequence of 32; sample more"):
        sampled_stream(tokens[:31], 0, run)
