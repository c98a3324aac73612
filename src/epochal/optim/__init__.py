"""Optimizers as torch.optim.Optimizer subclasses, and the spectral clips.

An optimizer is the class `Name` in the module `epochal.optim.<name in lower case>`: AdEMAMix, Fira, Lion, Mars, Muon,
Signum, Spectra, and torch's AdamW. `from epochal.optim import Fira` imports only that module.
"""

import importlib
from typing import Any

from epochal.optim.fira import fira_param_groups
from epochal.optim.spectral_clip import hard_spectral_clip, soft_spectral_clip

__all__ = ["fira_param_groups", "hard_spectral_clip", "soft_spectral_clip"]


def __getattr__(name: str) -> Any:
    # Python calls this for names that are not defined above. Names of optimizers begin with a capital; anything else
    # is a submodule, which Python imports itself after an AttributeError.
    if name[0].isupper():
        try:
            return getattr(importlib.import_module(f"epochal.optim.{name.lower()}"), name)
        except ModuleNotFoundError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
