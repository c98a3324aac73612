"""Models, their configs, ensembles as models, and loading of finished ones."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Planning counts parameters with `models.config` on machines without torch, so torch is imported on first use.
    if name in ("EnsembleConfig", "EnsembleForCausalLM"):
        from epochal.models import ensemble

        return getattr(ensemble, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
