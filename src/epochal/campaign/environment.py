"""The environment of processes that a campaign starts: variables without a launcher's, and cores."""

import os
from collections.abc import Mapping

# Variables by which accelerate, DeepSpeed, torch and transformers take a process for one of several (torchrun, MPI).
NAMES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "FORK_LAUNCHED",
)
# And those by which accelerate passes a preset, of which a shell may still have some. SLURM_* is read by none of them, and
# srun needs it.
PREFIXES = (
    *("OMPI_COMM_", "PMI_", "PMIX_", "MV2_COMM_", "TORCHELASTIC_", "PET_"),
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_"),
)
# Of accelerate's, these set no preset.
KEPT = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_DISABLE_RICH")


def launcher_variables(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that make a process one of several, or give it a preset."""
    return sorted(name for name in environment if name in NAMES or (name.startswith(PREFIXES) and name not in KEPT))


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that starts alone: no launcher's variables, no modules of the working folder."""
    dropped = launcher_variables(environment)
    # `python -m` would import a file such as numpy.py of the working folder instead of the package.
    return {**{name: value for name, value in environment.items() if name not in dropped}, "PYTHONSAFEPATH": "1"}


def usable_cores() -> list[int]:
    """Return the cores that this process may use, which may be fewer than all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))  # only Linux says which cores a process may use
