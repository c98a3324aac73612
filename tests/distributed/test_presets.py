"""A setting of a preset that would change a result is refused with an error that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from epochal.config import REPOSITORY
from epochal.distributed.presets import REASONS, Preset, check_deepspeed, check_modes, deepspeed_config, read_preset

GRAPH = Preset(modes=frozenset({"cuda-graph"}))
DEEPSPEED = sorted((REPOSITORY / "configs" / "deepspeed").glob("*.json"))


def environment(path: Path) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_every_committed_deepspeed_preset_is_accepted_and_clipping_is_set(path: Path) -> None:
    preset = read_preset(environment(path))
    assert preset.backend == path.stem.split("-")[0]
    for clip_norm in (1.0, 0.25, 0.0):
        config = deepspeed_config(preset, micro_batch=4, world=2, clip_norm=clip_norm)
        assert config["gradient_clipping"] == clip_norm, "DeepSpeed's own default is 1.0"
        assert config["gradient_accumulation_steps"] == 1 and config["train_batch_size"] == 8


def test_a_deepspeed_config_is_located_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_preset(environment(Path("configs/deepspeed/zero2.json"))).backend == "zero2"


def table(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, **changes}


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED = [
    (table(optimizer={"type": "AdamW"}), "optimizer"),
    (table(scheduler={"type": "WarmupLR"}), "scheduler"),
    (table(bf16={"enabled": True}), "bf16"),
    (table(fp16={"enabled": True}), "fp16"),
    (table(torch_autocast={"enabled": True}), "torch_autocast"),
    (table(gradient_clipping=1.0), "gradient_clipping"),
    (table(gradient_accumulation_steps=4), "gradient_accumulation_steps"),
    (table(train_micro_batch_size_per_gpu=4), "train_micro_batch_size_per_gpu"),
    (table(communication_data_type="bf16"), "communication_data_type"),
    (table(pipeline={"stages": 2}), "pipeline"),
    (table(tensor_parallel={"autotp_size": 2}), "tensor_parallel"),
    (table(something_new=True), "something_new"),
    ({"zero_optimization": {"stage": 0}}, "stage is 0"),
    ({}, "stage is None"),
]
ZERO_REFUSED = [
    {"round_robin_gradients": True},
    {"elastic_checkpoint": True},
    {"zenflow": {"topk_ratio": 0.1}},
    {"super_offload": True},
    {"zero_hpz_partition_size": 8},
    {"zero_quantized_weights": True},
    {"zero_quantized_gradients": True},
    {"offload_optimizer": {"device": "nvme", "nvme_path": "/local"}},
    {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
    {"offload_param": {"device": "cpu"}},
    {"stage3_something_new": 1},
]


@pytest.mark.parametrize(("config", "key"), REFUSED, ids=[key for _, key in REFUSED])
def test_a_key_that_would_change_a_result_is_refused_by_name(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key) as raised:
        check_deepspeed(config, "preset.json")
    assert str(raised.value).startswith("preset.json: ") and str(raised.value).count(". ") == 0


@pytest.mark.parametrize("zero", ZERO_REFUSED, ids=lambda zero: next(iter(zero)))
def test_zero_settings_that_are_broken_or_not_tested_are_refused_by_name(zero: dict[str, Any]) -> None:
    key = next(iter(zero))
    with pytest.raises(ValueError, match="nvme|ratio" if "optimizer" in key else key):
        check_deepspeed(
            {"zero_optimization": {"stage": 2, **zero}, "zero_force_ds_cpu_optimizer": False}, "preset.json"
        )


def test_settings_that_are_off_are_accepted() -> None:
    off = {"round_robin_gradients": False, "zero_quantized_weights": False, "elastic_checkpoint": False}
    check_deepspeed(table(bf16={"enabled": False}) | {"zero_optimization": {"stage": 3, **off}}, "preset.json")


def test_offload_that_would_replace_the_optimizer_is_refused() -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for force in ({}, {"zero_force_ds_cpu_optimizer": True}):
        with pytest.raises(ValueError, match="zero_force_ds_cpu_optimizer"):
            check_deepspeed(offload | force, "preset.json")


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "gradient_clipping"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed_config_file"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "fsdp_transformer_layer_cls_to_wrap"),
        ({"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}, "dynamo_backend to AOT_EAGER"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, "dynamo_mode"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_DYNAMIC": "True"}, "dynamo_use_dynamic"),
    ],
)
def test_a_setting_of_accelerate_that_would_change_a_result_is_refused(variables: dict[str, str], setting: str) -> None:
    with pytest.raises(ValueError, match=setting):
        read_preset(variables)


def launched(name: str) -> dict[str, str]:
    """The environment in which `accelerate launch` starts the processes of a committed preset."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = REPOSITORY / "configs" / "accelerate" / f"{name}.yaml"
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    return dict(prepare_multi_gpu_env(arguments))


def test_settings_of_accelerate_that_are_modes_are_read() -> None:
    assert read_preset({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}).modes == {"compile"}
    assert read_preset(FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, ["fused"]).modes == {"recompute", "fused"}
    assert read_preset(launched("fsdp2-nodes")).gather_linears and not read_preset(launched("fsdp2")).gather_linears
    with pytest.raises(
        ValueError, match=r"mode 'compiled' is unknown \(did you mean 'compile'\?\); choose from compile,"
    ):
        read_preset({}, ["compiled"])


@pytest.mark.parametrize(
    ("preset", "changes", "world", "device", "message"),
    [
        (Preset("zero3", modes=frozenset({"compile"})), {}, 2, "cuda", "compile does not work under zero3"),
        (Preset("zero3", modes=frozenset({"recompute"})), {}, 2, "cuda", "recompute does not work under zero3"),
        (Preset("fsdp2", gather_linears=True, modes=frozenset({"compile"})), {}, 2, "cuda", "that gathers linear maps"),
        (Preset("fsdp2", gather_linears=True, modes=frozenset({"fused"})), {}, 2, "cuda", "that gathers linear maps"),
        (GRAPH, {}, 1, "cpu", "this machine has no CUDA device"),
        (GRAPH, {}, 2, "cuda", "the run has 2 processes"),
        (GRAPH, {"dropout": 0.1}, 1, "cuda", "dropout and masked inputs"),
        (GRAPH, {"input_mask_prob": 0.1}, 1, "cuda", "dropout and masked inputs"),
        (Preset(modes=frozenset({"cuda-graph", "recompute"})), {}, 1, "cuda", "recompute saves nothing"),
    ],
)
def test_a_mode_that_does_not_work_is_refused_with_the_reason(
    preset: Preset, changes: dict[str, Any], world: int, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_modes(preset, tiny.run(Path("tiny.toml"), **changes), world=world, device=device)
    check_modes(
        Preset("fsdp2", modes=frozenset({"compile", "recompute"})), tiny.run(Path("x.toml")), world=2, device="cpu"
    )


def test_a_damaged_config_is_named_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "half.json"
    path.write_text(json.dumps({"zero_optimization": {}})[:-3], encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_preset(environment(path))


def test_every_reason_is_for_a_refused_key() -> None:
    from epochal.distributed.presets import DEEPSPEED_KEYS, OFFLOAD_KEYS, ZERO_KEYS

    assert not REASONS.keys() & (DEEPSPEED_KEYS | ZERO_KEYS | OFFLOAD_KEYS)
