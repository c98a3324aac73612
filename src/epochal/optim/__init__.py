"""Optimizers as torch.optim.Optimizer subclasses, and the spectral clips; imports torch and, for a GPU, the kernels."""

from epochal.optim.ademamix import AdEMAMix
from epochal.optim.fira import Fira, fira_param_groups
from epochal.optim.lion import Lion
from epochal.optim.mars import Mars
from epochal.optim.muon import Muon
from epochal.optim.signum import Signum
from epochal.optim.spectra import Spectra
from epochal.optim.spectral_clip import hard_spectral_clip, soft_spectral_clip

__all__ = [
    "AdEMAMix",
    "Fira",
    "Lion",
    "Mars",
    "Muon",
    "Signum",
    "Spectra",
    "fira_param_groups",
    "hard_spectral_clip",
    "soft_spectral_clip",
]
