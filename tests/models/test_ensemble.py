"""The ensemble as a transformers model against loops without caches, in float64."""

import functools
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from epochal.models.ensemble import EnsembleConfig, EnsembleForCausalLM
from epochal.models.llama import build_model

V = 12
WEIGHTS = (0.5, 0.2, 0.3)
AVERAGES = ["logits", "probs"]


def write_members(folder: Path, names: Sequence[str] = ("w16", "w32", "w16"), **options: Any) -> list[Path]:
    """Members of two sizes that disagree, without an end token by default."""
    paths = []
    for seed, name in enumerate(names):
        model = build_model(name, **{"vocab_size": V, "max_positions": 64, "seed": seed, "bos_token_id": 0, **options})
        with torch.no_grad():
            model.lm_head.weight.mul_(3.0)
        paths.append(folder / f"{name}-{seed}")
        model.save_pretrained(paths[-1])
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_members(tmp_path_factory.mktemp("members"))


@functools.cache
def wide(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).double().eval()


def loaded(paths: list[Path], average: str, **options: Any) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members(paths, average=average, **options)


def exact(
    paths: list[Path],
    rows: torch.Tensor,
    average: str,
    weights: Sequence[float] = (1 / 3,) * 3,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Log-probabilities (b, t, V) from whole passes in float64, with no cache and no padding."""
    total = torch.zeros(*rows.shape, V, dtype=torch.float64)
    with torch.no_grad():
        for path, weight in zip(paths, weights, strict=True):
            logits = wide(path)(input_ids=rows).logits / temperature
            total += weight * (logits if average == "logits" else logits.softmax(-1))
    return total.log_softmax(-1) if average == "logits" else total.log()


def prompts(texts: int = 3, length: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, V, (texts, length), generator=torch.Generator().manual_seed(seed))


# --- scores -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_are_the_weighted_mean(paths: list[Path], average: str, temperature: float) -> None:
    rows = prompts()
    model = loaded(paths, average, weights=WEIGHTS, temperature=temperature)
    output = model(rows, labels=rows)
    expected = exact(paths, rows, average, WEIGHTS, temperature)
    assert torch.allclose(output.logits.double().log_softmax(-1), expected, atol=1e-5)
    if average == "probs":
        assert torch.allclose(output.logits.double(), expected, atol=1e-5), "they are normalized log-probabilities"
    loss = torch.nn.functional.nll_loss(expected[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(model(rows, logits_to_keep=2).logits, output.logits[:, -2:], atol=1e-5)


@pytest.mark.parametrize("average", AVERAGES)
def test_a_member_with_weight_zero_has_no_effect(paths: list[Path], average: str) -> None:
    rows = prompts()
    logits = loaded(paths, average, weights=(0.0, 1.0, 0.0))(rows).logits.log_softmax(-1)
    assert torch.allclose(logits.double(), exact(paths[1:2], rows, average, (1.0,)), atol=1e-5)


# --- generation ---------------------------------------------------------------------------------------------------------


def greedy_by_hand(paths: list[Path], rows: torch.Tensor, average: str, tokens: int) -> torch.Tensor:
    for _ in range(tokens):
        best = exact(paths, rows, average)[:, -1].argmax(-1)
        rows = torch.cat([rows, best[:, None]], 1)
    return rows


@pytest.mark.parametrize("average", AVERAGES)
def test_greedy_decoding_equals_a_loop_without_a_cache(paths: list[Path], average: str) -> None:
    model, rows = loaded(paths, average), prompts()
    expected = greedy_by_hand(paths, rows, average, 12)
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 2}):
        generated = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=12, **options)
        assert torch.equal(generated, expected), options


@pytest.mark.parametrize("average", AVERAGES)
def test_left_padding_changes_nothing(paths: list[Path], average: str) -> None:
    model = loaded(paths, average)
    texts = [prompts(1, length, seed=length) for length in (2, 7, 4)]
    rows = torch.stack([torch.nn.functional.pad(text[0], (7 - text.shape[1], 0), value=0) for text in texts])
    mask = torch.stack(
        [torch.arange(7) >= 7 - text.shape[1] for text in texts],
    ).long()
    generated = model.generate(rows, attention_mask=mask, max_new_tokens=10, do_sample=False)
    for text, row in zip(texts, generated, strict=True):
        assert torch.equal(row[7 - text.shape[1] :], greedy_by_hand(paths, text, average, 10)[0])


def test_learned_positions_do_not_count_padding(paths: list[Path], tmp_path: Path) -> None:
    """GPT-2 with Llama: rotary embeddings depend on distances only, learned positions on absolute positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None)
    gpt2 = GPT2LMHeadModel(config).eval()
    gpt2.transformer.wpe.weight.data.mul_(30.0)
    gpt2.save_pretrained(tmp_path / "gpt2")
    mixed, text = [paths[0], tmp_path / "gpt2"], prompts(1, 4)
    rows = torch.cat([torch.nn.functional.pad(text, (3, 0), value=0), prompts(1, 7, seed=1)])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    generated = loaded(mixed, "probs").generate(rows, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for _ in range(8):
        best = exact(mixed, text, "probs", (0.5, 0.5))[:, -1].argmax(-1)
        text = torch.cat([text, best[:, None]], 1)
    assert torch.equal(generated[0, 3:], text[0])


@pytest.mark.parametrize("average", AVERAGES)
def test_beam_search_equals_a_search_without_a_cache(paths: list[Path], average: str) -> None:
    model, start, beams, tokens = loaded(paths, average), prompts(1), 3, 8
    rows, scores = start, torch.zeros(1, dtype=torch.float64)
    for _ in range(tokens):
        following = scores[:, None] + exact(paths, rows, average)[:, -1]
        scores, picked = following.flatten().topk(beams)
        rows = torch.cat([rows[picked // V], picked[:, None] % V], 1)
    generated = model.generate(
        start, num_beams=beams, num_return_sequences=beams, max_new_tokens=tokens, do_sample=False
    )
    assert torch.equal(generated, rows)


@pytest.mark.parametrize("shape", [{}, {"top_k": 3}, {"temperature": 0.7}])
@pytest.mark.parametrize("average", AVERAGES)
def test_sampling_from_the_mean_equals_a_loop_without_a_cache(
    paths: list[Path], average: str, shape: dict[str, Any]
) -> None:
    if average == "probs" and not shape:
        shape = {"output_logits": True, "return_dict_in_generate": True}  # returning logits requires the mean
    model, rows = loaded(paths, average), prompts(4)
    torch.manual_seed(5)
    generated = model.generate(rows, do_sample=True, max_new_tokens=9, **shape)
    generated = getattr(generated, "sequences", generated)
    torch.manual_seed(5)
    for _ in range(9):
        scores = exact(paths, rows, average)[:, -1].float() / shape.get("temperature", 1.0)
        cut = scores.topk(shape.get("top_k", V)).values[:, -1:]
        probabilities = scores.masked_fill(scores < cut, -torch.inf).softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probabilities, 1)], 1)
    assert torch.equal(generated, rows)


@pytest.mark.parametrize("texts", [1, 3])
@pytest.mark.parametrize("padding", [0, 2])
def test_sampling_one_member_per_token_equals_a_loop_without_a_cache(
    paths: list[Path], texts: int, padding: int
) -> None:
    model, rows = loaded(paths, "probs", weights=WEIGHTS), prompts(texts)
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    torch.manual_seed(1)
    generated = model.generate(rows, attention_mask=mask, do_sample=True, max_new_tokens=40)
    torch.manual_seed(1)
    for _ in range(40):
        drawn = torch.multinomial(torch.tensor(WEIGHTS, dtype=torch.float64), texts, replacement=True)
        member_probs = []
        for text, k in enumerate(drawn.tolist()):
            whole = rows[text : text + 1, padding if text == 0 else 0 :]
            with torch.no_grad():
                member_probs.append(wide(paths[k])(input_ids=whole).logits[0, -1].softmax(-1).float())
        rows = torch.cat([rows, torch.multinomial(torch.stack(member_probs), 1)], 1)
    assert torch.equal(generated, rows)


@pytest.mark.parametrize("average", AVERAGES)
def test_100_000_sampled_tokens_follow_the_mean_distribution(paths: list[Path], average: str) -> None:
    """Chi-square of three tokens in a row, V^3 cells, against the product of exact mean distributions."""
    from scipy import stats

    model, texts, start = loaded(paths, average, weights=WEIGHTS), 33_400, torch.tensor([[0]])
    torch.manual_seed(0)
    counts = np.zeros((V, V, V))
    for batch in torch.split(start.expand(texts, 1), 1670):
        drawn = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=True, max_new_tokens=3)
        np.add.at(counts, tuple(drawn[:, 1:].T.numpy()), 1)
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    steps = exact(paths, torch.cat([torch.zeros(V * V, 1, dtype=torch.long), pairs], 1), average, WEIGHTS).exp()
    first = steps[:, 0].gather(1, pairs[:, :1]) * steps[:, 1].gather(1, pairs[:, 1:])
    expected = (first * steps[:, 2]).flatten().numpy() * texts
    rare = expected < 5
    seen = np.append(counts.flatten()[~rare], counts.flatten()[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    other = "probs" if average == "logits" else "logits"
    wrong = exact(paths, torch.cat([torch.zeros(V * V, 1, dtype=torch.long), pairs], 1), other, WEIGHTS).exp()[:, 2]
    wrong_cells = (first * wrong).flatten().numpy() * texts
    wanted = np.append(wrong_cells[~rare], wrong_cells[rare].sum())
    assert stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue < 1e-6, "the test could not fail"


# --- caches -------------------------------------------------------------------------------------------------------------


def lagging(model: EnsembleForCausalLM, rows: torch.Tensor) -> Any:
    """A cache in which some members are behind."""
    torch.manual_seed(3)
    cache = model._new_cache()
    cache.one_member = True
    for column in torch.split(rows, 1, dim=1):
        model(column, past_key_values=cache, use_cache=True)
    cache.one_member = False
    lengths = [member.get_seq_length() for member in cache.members]
    assert min(lengths) < max(lengths) == cache.get_seq_length()
    return cache


@pytest.mark.parametrize("operation", ["none", "reorder", "select", "repeat", "crop"])
def test_cache_operations_apply_to_members_that_are_behind(paths: list[Path], operation: str) -> None:
    model, rows = loaded(paths, "probs"), prompts(2, 6)
    cache, order = lagging(model, rows), torch.tensor([1, 0])
    if operation == "reorder":
        cache.reorder_cache(order)
        rows = rows[order]
    elif operation == "select":
        cache.batch_select_indices(order[:1])
        rows = rows[order[:1]]
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        rows = rows.repeat_interleave(2, 0)
    elif operation == "crop":
        cache.crop(-4)
        rows = rows[:, :-4]
    assert (cache.batch_size, cache.get_seq_length()) == tuple(rows.shape)
    new = prompts(len(rows), 3, seed=9)
    logits = model(new, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(logits.double(), exact(paths, torch.cat([rows, new], 1), "probs")[:, -3:], atol=1e-5)


# --- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", AVERAGES)
def test_a_saved_folder_is_self_contained(tmp_path: Path, average: str) -> None:
    paths = write_members(tmp_path / "members", eos_token_id=1)
    model = loaded(paths, average, weights=WEIGHTS, temperature=0.9)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "members").rename(tmp_path / "elsewhere")
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
    assert isinstance(again, EnsembleForCausalLM) and again.resident
    rows = prompts()
    assert torch.equal(again(rows).logits, model(rows).logits)
    assert (again.config.average, again.config.temperature, again.config.eos_token_id) == (average, 0.9, 1)
    assert again.generation_config.eos_token_id == 1


def test_members_beyond_the_memory_limit_are_loaded_one_at_a_time(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, alive = prompts(), []
    whole = loaded(paths, "logits")
    model = loaded(paths, "logits", memory_limit=1000)
    load = model._load

    def watched(path: str) -> Any:
        assert all(reference() is None for reference in alive), "the previous member is still in memory"
        member = load(path)
        alive.append(weakref.ref(member))
        return member

    monkeypatch.setattr(model, "_load", watched)
    assert whole.resident and not model.resident and not list(model.parameters())
    assert torch.equal(model(rows).logits, whole(rows).logits) and len(alive) == 3
    assert torch.equal(model.generate(rows, max_new_tokens=3), whole.generate(rows, max_new_tokens=3))


def test_the_tokenizer_is_saved_and_must_be_the_same_for_all_members(tmp_path: Path, prepared: Path) -> None:
    paths = write_members(tmp_path / "members", vocab_size=300)
    for path in paths:
        for file in (prepared / "work" / "data" / "tiny" / "tokenizer").iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    loaded(paths, "logits").save_pretrained(tmp_path / "saved")
    text = "a line of text"
    expected = AutoTokenizer.from_pretrained(paths[0])(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == expected
    # The same tokenizer in another layout is the same; the same size with two ids exchanged is not.
    table = json.loads((paths[1] / "tokenizer.json").read_text())
    (paths[1] / "tokenizer.json").write_text(json.dumps(table))
    assert loaded(paths, "logits").config.vocab_size == 300
    vocabulary = table["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (paths[1] / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="give 'A' different ids; all members must have the same vocabulary"):
        loaded(paths, "logits")


def test_members_elsewhere_and_pickled_members_raise(tmp_path: Path) -> None:
    paths = write_members(tmp_path / "members", ["w16"])
    loaded(paths, "logits").save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "config.json"
    text = config.read_text()
    for member in (str(paths[0]), "../members/w16-0", "owner/model"):
        config.write_text(text.replace("member-00", member))
        with pytest.raises(ValueError, match="is not a folder inside it; export the ensemble again"):
            EnsembleForCausalLM.from_pretrained(tmp_path / "saved")
    torch.save({}, paths[0] / "pytorch_model.bin")
    (paths[0] / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        loaded(paths, "logits")


@pytest.mark.parametrize(
    "keep",
    [torch.tensor([0, 3]), torch.tensor([[1, 4], [0, 2], [3, 3]]), torch.arange(15).view(3, 5) % 2 == 0],
    ids=["positions", "positions of each text", "mask"],
)
def test_positions_to_keep_are_those_of_llama(paths: list[Path], keep: torch.Tensor) -> None:
    """Of one member the ensemble is that member, so its outputs are the oracle."""
    rows, one, llama = prompts(), loaded(paths[:1], "logits"), wide(paths[0])
    expected = llama(rows, logits_to_keep=keep, output_hidden_states=True)
    found = one(rows, logits_to_keep=keep, output_hidden_states=True)
    assert torch.allclose(found.logits.double(), expected.logits, atol=1e-5)
    for mine, its in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(mine.double(), its, atol=1e-5)
    assert isinstance(one(rows, return_dict=False), tuple) and one(rows, use_cache=False).past_key_values is None


def test_what_an_ensemble_cannot_return_is_refused(paths: list[Path]) -> None:
    from transformers import DynamicCache

    model, rows = loaded(paths, "probs"), prompts()
    for options, message in [
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"past_key_values": DynamicCache()}, "must come from this ensemble, got DynamicCache"),
        ({"inputs_embeds": torch.zeros(1, 1, 1)}, "pass input_ids"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(rows, **options)


@pytest.mark.parametrize("member", ["..", "/", "gpt2", "../saved/member-00"])
def test_a_folder_cannot_name_members_outside_of_it(paths: list[Path], tmp_path: Path, member: str) -> None:
    loaded(paths[:1], "logits").save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    (tmp_path / "saved" / "config.json").write_text(json.dumps({**config, "members": [member]}))
    with pytest.raises(ValueError, match="is not a folder inside it"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_invalid_members_and_options_raise(tmp_path: Path, paths: list[Path]) -> None:
    other = write_members(tmp_path, ["w16"], vocab_size=V + 1)
    for arguments, message in [
        ((paths, "mean"), "must be one of logits, probs"),
        (([], "logits"), "members is empty"),
        (([*paths, *other], "logits"), "members have vocab_size"),
    ]:
        with pytest.raises(ValueError, match=message):
            loaded(*arguments)
    with pytest.raises(ValueError, match="that sum to 1"):
        loaded(paths, "logits", weights=(0.5, 0.2, 0.2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        loaded(paths, "logits", temperature=0.0)
    with pytest.raises(ValueError, match="average must be one of"):
        EnsembleForCausalLM(EnsembleConfig(members=[str(path) for path in paths]))
    with pytest.raises(ValueError, match="device_map and quantization_config are not supported"):
        EnsembleForCausalLM.from_pretrained(paths[0], device_map="auto")
    with pytest.raises(ValueError, match="is not supported for ensembles"):
        loaded(paths, "logits").generate(prompts(), cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="pass input_ids"):
        loaded(paths, "logits")(inputs_embeds=torch.zeros(1, 1, 16))
