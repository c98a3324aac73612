import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from epochal.config import REPOSITORY, model_path
from epochal.models.config import INITIALISATIONS, check_config, parameter_counts, read_config
from epochal.models.llama import build_model, draw_weights, empty_model, load_config, weight_rule

# docs/infinite_compute.md, section 2: total and non-embedding, exact.
INFINITE_COMPUTE = {
    "ic-150m": (154_147_328, 22_813_184),
    "ic-300m": (299_649_792, 102_648_576),
    "ic-600m": (602_457_088, 339_788_800),
    "ic-1.4b": (1_431_373_824, 906_037_248),
    "ic-3.2b": (3_243_444_224, 2_718_107_648),
}
# docs/spectra.md, section 2.2: total and non-embedding, in millions.
SPECTRA = {"spectra-160m": (162.2, 85.0)}
# Ladders of this repository.
LADDERS = {
    "w6": (25_116, 540),
    "w10": (43_910, 2_950),
    "w18": (83_214, 9_486),
    "w22": (104_258, 14_146),
    "w38": (197_714, 42_066),
    "w56": (366_184, 136_808),
    "w84": (651_588, 307_524),
    "w16": (73_040, 7_504),
    "w32": (160_928, 29_856),
    "w64": (440_768, 178_624),
    "w96": (794_784, 401_568),
    "w128": (1_475_712, 951_424),
    "w192": (3_461_184, 2_674_752),
    "docs-4m": (3_712_704, 2_139_840),
    "docs-8m": (7_802_112, 5_704_960),
    "docs-20m": (20_257_152, 17_111_424),
    "docs-35m": (34_611_712, 30_417_408),
    "gpu-25m": (24_666_048, 5_349_312),
    "gpu-50m": (50_020_160, 17_825_600),
}
ALL = [*INFINITE_COMPUTE, *SPECTRA, *LADDERS]
BASES = {"llama-3.2-3b": 3_212_749_824}  # for continued pre-training; count from the model card
VOCABULARY = {"ic": 128_256, "spectra": 50_304, "gpu": 50_304, "docs": 4096}


@pytest.fixture
def model_file(tmp_path):
    """Write w64 with some keys replaced (None: removed) and return the path."""

    def write(**changes):
        keys = {**read_config("w64"), **changes}
        path = tmp_path / "model.json"
        path.write_text(json.dumps({key: value for key, value in keys.items() if value is not None}))
        return path

    return write


def weights(name="w64", *, seed=0, vocab_size=2048, **options):
    return dict(build_model(name, vocab_size=vocab_size, max_positions=256, seed=seed, **options).named_parameters())


# Counts


def test_every_committed_model_has_a_count_here():
    committed = (REPOSITORY / "configs" / "models").glob("*.json")
    assert sorted(path.stem for path in committed) == sorted([*ALL, *BASES])


@pytest.mark.parametrize(("name", "total"), BASES.items())
def test_counts_of_models_for_continued_pretraining(name, total):
    shapes = {key: parameter.numel() for key, parameter in empty_model(load_config(name)).named_parameters()}
    assert sum(shapes.values()) == parameter_counts(name).total == total
    assert load_config(name).rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(("name", "expected"), (INFINITE_COMPUTE | LADDERS).items())
def test_exact_counts(name, expected):
    assert parameter_counts(name) == expected


@pytest.mark.parametrize(("name", "millions"), SPECTRA.items())
def test_spectra_counts(name, millions):
    assert tuple(round(count / 1e6, 1) for count in parameter_counts(name)) == millions


@pytest.mark.parametrize("name", ALL)
def test_transformers_builds_what_is_counted(name):
    model = empty_model(load_config(name))
    shapes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    vocabulary = shapes["model.embed_tokens.weight"] + shapes["lm_head.weight"]
    assert (sum(shapes.values()), sum(shapes.values()) - vocabulary) == parameter_counts(name)


@pytest.mark.parametrize("name", ALL)
def test_architecture_is_that_of_the_papers(name):
    config = load_config(name)
    assert not config.tie_word_embeddings
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
    assert config.rms_norm_eps == 1e-5
    assert config.hidden_act == "silu"
    assert config.vocab_size == VOCABULARY.get(name.split("-")[0], 2048)


def test_grouped_heads_and_explicit_head_dim_are_counted(model_file):
    path = model_file(num_attention_heads=4, num_key_value_heads=2, head_dim=24)
    built = empty_model(load_config(path))
    assert sum(p.numel() for p in built.parameters()) == parameter_counts(path).total


def test_vocabulary_override():
    assert parameter_counts("w64", vocab_size=300).total == parameter_counts("w64").total - 2 * 64 * (2048 - 300)
    assert load_config("w64", vocab_size=300).vocab_size == 300
    assert weights(vocab_size=300)["lm_head.weight"].shape == (300, 64)


def test_tied_head_is_counted_drawn_and_kept_once(model_file):
    path = model_file(tie_word_embeddings=True)
    untied, tied = parameter_counts("w64"), parameter_counts(path)
    assert (tied.total, tied.non_embedding) == (untied.total - 2048 * 64, untied.non_embedding)
    model = build_model(path, vocab_size=2048, max_positions=256, seed=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == tied.total


def test_untied_head_is_a_separate_matrix():
    drawn = weights()
    assert not torch.equal(drawn["lm_head.weight"] * 8, drawn["model.embed_tokens.weight"] * 64)


def test_counting_needs_no_torch():
    code = "import sys, epochal.models.config as m; m.parameter_counts('ic-1.4b'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())


# Initialisation


def cut_normal_deviation(cut):
    """Standard deviation of a unit normal cut at +-cut."""
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))


def assert_drawn(weight, *, std, cut=math.inf):
    """Mean, standard deviation and range agree with a normal cut at +-cut sigma, to five standard errors.

    That of the standard deviation is sigma / sqrt(2 n) for a normal, and less for a cut one.
    """
    n = weight.numel()
    expected = std * (1.0 if math.isinf(cut) else cut_normal_deviation(cut))
    assert abs(weight.mean().item()) < 5 * expected / math.sqrt(n)
    assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * n)
    if not math.isinf(cut):
        assert weight.abs().max().item() <= cut * std
        assert weight.abs().max().item() > 0.9 * cut * std


def test_infinite_compute_statistics():
    drawn = weights("w128")
    assert_drawn(drawn["model.embed_tokens.weight"], std=1 / 128, cut=3)
    assert_drawn(drawn["lm_head.weight"], std=128**-0.5, cut=3)
    for module, fan_in in (("self_attn.q_proj", 128), ("self_attn.o_proj", 128), ("mlp.down_proj", 448)):
        assert_drawn(drawn[f"model.layers.1.{module}.weight"], std=fan_in**-0.5, cut=3)


def test_fan_in_of_the_attention_output_is_heads_times_head_dim(model_file):
    drawn = weights(model_file(num_attention_heads=4, num_key_value_heads=4, head_dim=64))
    assert_drawn(drawn["model.layers.0.self_attn.o_proj.weight"], std=256**-0.5, cut=3)


def test_normal_statistics():
    for name, weight in weights(initialisation="normal").items():
        if "norm" not in name:
            assert_drawn(weight, std=0.02)


def test_gpt2_scales_the_residual_projections_only():
    for name, weight in weights(initialisation="gpt2").items():
        if "norm" not in name:
            residual = "o_proj" in name or "down_proj" in name
            assert_drawn(weight, std=0.02 / math.sqrt(6) if residual else 0.02)


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_norms_are_one(initialisation):
    norms = [weight for name, weight in weights("w32", initialisation=initialisation).items() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(weight, torch.ones(32)) for weight in norms)


def test_initializer_range_of_the_file_is_used(model_file):
    drawn = weights(model_file(initialisation="normal", initializer_range=0.1))
    assert_drawn(drawn["lm_head.weight"], std=0.1)


@pytest.mark.parametrize(
    ("prefix", "initialisation"),
    [
        ("ic", "infinite-compute"),
        ("w", "infinite-compute"),
        ("gpu", "infinite-compute"),
        ("spectra", "gpt2"),
    ],
)
def test_each_paper_has_its_initialisation(prefix, initialisation):
    chosen = {read_config(name)["initialisation"] for name in ALL if name.startswith(prefix)}
    assert chosen == {initialisation}


def test_initial_loss_is_that_of_unit_normal_logits():
    # Rows of the head have norm near 1 and the final norm gives vectors of length sqrt(h), so that logits are close to
    # N(0, 1): the expected cross-entropy is ln V + 1/2.
    model = build_model("w128", vocab_size=2048, max_positions=256, seed=0).eval()
    tokens = torch.randint(0, 2048, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(math.log(2048) + 0.5, abs=0.1)


# Determinism


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = weights(seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = weights(seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) and again[name].dtype == torch.float32 for name in first)
    other = weights(seed=4)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)


def test_all_matrices_differ():
    matrices = [weight for weight in weights().values() if weight.shape == (64, 64)]
    assert len({weight[0, 0].item() for weight in matrices}) == len(matrices) == 12


def test_an_additional_layer_leaves_the_other_layers_unchanged(model_file):
    three, four = weights("w64"), weights(model_file(num_hidden_layers=4))
    assert set(three) < set(four)
    assert all(torch.equal(three[name], four[name]) for name in three)


def test_drawing_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    one = weights()["lm_head.weight"]
    torch.set_num_threads(threads + 1)
    try:
        assert torch.equal(one, weights()["lm_head.weight"])
    finally:
        torch.set_num_threads(threads)


def test_weights_of_seed_0_are_unchanged():
    # Committed records belong to these weights.
    drawn = weights("w32", seed=0)["model.layers.0.mlp.up_proj.weight"][0, :3]
    assert drawn.tolist() == pytest.approx([-0.17091149, 0.16413327, -0.08988865], rel=1e-5)


def test_rotary_frequencies_are_restored_after_construction_on_meta():
    model = build_model("w64", vocab_size=2048, max_positions=256, seed=0)
    expected = 10_000.0 ** (-torch.arange(0, 32, 2).float() / 32)
    assert torch.allclose(model.model.rotary_emb.inv_freq, expected)


def test_saved_folder_is_a_model_file_and_loads_in_transformers(tmp_path):
    from transformers import LlamaForCausalLM

    model = build_model("w32", vocab_size=300, max_positions=128, seed=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(tmp_path)
    keys = read_config(tmp_path)
    assert (keys["vocab_size"], keys["max_position_embeddings"]) == (300, 128)
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (1, 2)
    assert keys["initialisation"] == "infinite-compute"
    loaded = dict(LlamaForCausalLM.from_pretrained(tmp_path).named_parameters())
    assert all(torch.equal(weight, loaded[name]) for name, weight in model.named_parameters())
    rebuilt = weights(tmp_path, vocab_size=300)
    assert all(torch.equal(weight, rebuilt[name]) for name, weight in model.named_parameters())


def test_generates_with_its_own_token_ids():
    model = build_model(
        "w32", vocab_size=300, max_positions=128, seed=0, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    prompt = torch.tensor([[1, 5]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 6
    assert model.generation_config.eos_token_id == 2


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5; use 4 heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3; use 2 key"),
        ({"head_dim": 15}, "the head dimension must be even for rotary embeddings, got 15"),
        ({"initialisation": "gpt-2"}, "initialisation is 'gpt-2'; choose from infinite-compute, normal, gpt2"),
        ({"initialisation": "xyz"}, "initialisation is 'xyz'; choose from"),
        ({"initialization": "gpt2"}, "unknown key 'initialization' (did you mean 'initialisation'"),
        ({"hidden_sizes": 64}, "unknown key 'hidden_sizes' (did you mean 'hidden_size'"),
        ({"hidden_size": None}, "missing key 'hidden_size'; add it"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer from 1 to 10,000, got 0"),
        ({"intermediate_size": 22.5}, "intermediate_size must be of type int, got 22.5"),
        ({"vocab_size": True}, "vocab_size must be of type int, got True"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; choose from llama, mistral, qwen3"),
        ({"initializer_range": 0.0}, "initializer_range must be a number from 1e-12 to 1, got 0.0"),
        ({"mlp_bias": True}, "mlp_bias is true, but biases are not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout must be a number equal to 0, got 0.1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be of type float, got 'small'"),
        ({"rope_theta": -1.0}, "rope_theta must be a number from 1e-12"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' needs low_freq_factor"),
        ({"hidden_act": "swish9"}, "hidden_act is 'swish9'; choose from"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be of type bool"),
        ({"hidden_size": 10**12}, "hidden_size must be an integer from 1 to 16,777,216, got 1000000000000"),
        ({"bos_token_id": -1}, "bos_token_id must be an integer from 0"),
    ],
)
def test_invalid_model_files_raise_one_sentence(model_file, changes, message):
    path = model_file(**changes)
    with pytest.raises(ValueError) as caught:
        read_config(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "\n" not in text
    assert text.endswith(".")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ic-15b", "configs/models has no 'ic-15b' (did you mean 'ic-150m'?)"),
        ("w-64", "did you mean 'w64'"),
        ("zzzz", "known: docs-20m, "),
        ("configs/models/w640.json", "configs/models/w640.json does not exist"),
        (Path("nowhere"), "has no 'nowhere'"),
    ],
)
def test_a_missing_model_file_names_the_nearest(given, message):
    with pytest.raises(ValueError) as caught:
        load_config(given)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{'a': 1}", b"\xff\xfe{}", b"[1]"])
def test_damaged_model_files_raise(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"Model file '.*bad.json' (is not valid JSON|is not UTF-8|must be a JSON object)"
    ):
        read_config(path)


def test_names_resolve_in_the_repository_and_the_working_folder(tmp_path, monkeypatch):
    committed = model_path("w64").resolve()
    monkeypatch.chdir(tmp_path)
    assert model_path("w64") == committed
    local = tmp_path / "configs" / "models" / "mine-0.5b.json"
    local.parent.mkdir(parents=True)
    local.write_text(committed.read_text())
    assert parameter_counts("mine-0.5b") == parameter_counts("w64")


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"vocab_size must be an integer from 1 to 16,777,216, got 0"):
        weights(vocab_size=0)
    with pytest.raises(ValueError, match=r"Model 'w64': initialisation is 'norm'; choose from"):
        weights(initialisation="norm")
    with pytest.raises(ValueError, match=r"eos_token_id 300 is outside its vocabulary of 300"):
        weights(vocab_size=300, eos_token_id=300)
    with pytest.raises(ValueError, match=r"initialisation is 'nomal'; choose from"):
        weight_rule("nomal", "linear", fan_in=1, layers=1)
    with pytest.raises(ValueError, match=r"Model config: missing key 'initialisation'"):
        check_config({"model_type": "llama"})


def test_draw_weights_fills_any_empty_model():
    config = load_config("w32", vocab_size=100)
    model = empty_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    draw_weights(model, seed=0)
    expected = weights("w32", vocab_size=100)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in model.parameters())
