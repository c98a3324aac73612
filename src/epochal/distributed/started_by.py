"""The launcher that a user started `epochal train` with, and its parallelism preset; no torch.

    accelerate launch --multi_gpu --num_processes 8 -m epochal train RUN
    torchrun --nproc-per-node 8 -m epochal train RUN [--preset fsdp2]
    deepspeed --num_gpus 8 --module epochal train RUN [--preset zero3]

accelerate passes its own preset in environment variables; for the others this module adds the same variables. Without
--preset torchrun is DDP and deepspeed ZeRO-2.
"""

from collections.abc import Mapping, MutableMapping

from epochal.config import find_config

DEEPSPEED_DEFAULT = "zero2"


def launcher(environment: Mapping[str, str]) -> str | None:
    """Return "accelerate launch", "torchrun" or "deepspeed", or None if none of them started this process."""
    # They set all of these; a port and an address alone are often exported by hand.
    deepspeed = {"CROSS_RANK", "CROSS_SIZE"} <= environment.keys()
    elastic = "TORCHELASTIC_RUN_ID" in environment
    if not ({"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys() and (elastic or deepspeed)):
        return None
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return "accelerate launch"
    return "deepspeed" if deepspeed else "torchrun"


def use_preset(name: str | None, environment: MutableMapping[str, str]) -> str:
    """Put the preset `name` into the environment, and return what the record calls it.

    Raises ValueError for a preset that the launcher contradicts.
    """
    started = launcher(environment)
    if name is None and started != "deepspeed":
        return started or "here"
    name = name or DEEPSPEED_DEFAULT
    if started is None:
        raise ValueError(
            f"--preset {name} needs a launcher that starts its processes; start this with torchrun, accelerate launch or "
            "deepspeed, or use epochal run --preset."
        )
    if started == "accelerate launch":
        raise ValueError(
            f"accelerate launch has set the preset already, so --preset {name} contradicts it; leave it out, or give "
            f"accelerate launch --config_file."
        )
    added = _variables(name)
    shards = added.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if started == "deepspeed" and not shards:
        raise ValueError(
            f"deepspeed started these processes, but the preset {name!r} does not use DeepSpeed; choose one of zero1 to "
            "zero3, or start this with torchrun."
        )
    environment.update(added)
    return f"{started}, {name}"


def _variables(name: str) -> dict[str, str]:
    """Return the variables by which `accelerate launch` passes the preset `name` to `read_preset`."""
    import yaml

    table = yaml.safe_load(find_config("accelerate", name, ".yaml").read_text(encoding="utf-8"))
    kind = table.get("distributed_type", "NO")
    settings = {f"use_{kind}": True} if kind in ("DEEPSPEED", "FSDP") else {}
    settings |= {key: table[key] for key in ("mixed_precision", "gradient_accumulation_steps") if key in table}
    settings |= {**table.get("deepspeed_config", {}), **table.get("dynamo_config", {})}
    found = {f"accelerate_{key}": value for key, value in settings.items()} | table.get("fsdp_config", {})
    return {key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in found.items()}


def local_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes the launcher started on this machine."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
