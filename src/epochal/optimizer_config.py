"""The optimizer of a Run as a frozen dataclass: one class per kind, no torch.

`lr` is the peak learning rate and `wd` the decoupled weight decay: a decayed weight shrinks by lr(t) * wd(t) per step.
Defaults are those of the published scripts (docs/fira.md section 1.5, docs/spectra.md sections 1.10 and 2.3).

To add an optimizer, write its dataclass and put it into `__all__` and `Optimizer` in this file, and write a class of
the same name in epochal/optim/<name in lower case>.py, whose keywords have the names of the dataclass's fields (wd
becomes `weight_decay`, and beta1, beta2 the pair `betas`). TOML files and records name it by `kind`.
"""

from dataclasses import dataclass
from typing import Annotated

from epochal.ranges import Decay, Items, LessThanAll, OneOf, Positive, Range, Ranged, Share

__all__ = ["AdEMAMix", "AdamW", "Fira", "Lion", "Mars", "Muon", "Optimizer", "Signum", "Spectra"]

FIRA_VARIANTS = ("code", "paper", "galore")
FIRA_SCALINGS = ("column", "matrix")
FIRA_REFRESHES = ("svd", "gram", "subspace")
CLIP_DECAYS = ("constant", "linear", "sqrt", "cosine", "square", "exp")
OPERATORS = ("soft", "hard", "normalize")
APPLY_TO = ("2d", "all")


Beta = LessThanAll  # of a running average
Epsilon = Annotated[float, Range(0.0, 1.0)]
Steps = Annotated[int, Range(1, 10**9)]
NewtonSchulzSteps = Annotated[int, Range(1, 100)]
Factor = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Decoupled(Ranged):
    """The fields of every optimizer: peak learning rate and decoupled weight decay."""

    lr: Annotated[float, Range(0.0, 100.0)] = 1e-3
    wd: Decay = 0.1


@dataclass(frozen=True, kw_only=True)
class AdamW(Decoupled):
    """AdamW with PyTorch's decoupled decay: a decayed weight shrinks by lr(t) * wd per step."""

    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8


@dataclass(frozen=True, kw_only=True)
class Signum(Decoupled):
    """The sign of a Nesterov momentum."""

    momentum: Beta = 0.95
    nesterov: bool = True


@dataclass(frozen=True, kw_only=True)
class AdEMAMix(Decoupled):
    """Adam with a second, slow average; alpha and beta3 rise over the share `warmup` of all steps."""

    beta1: Beta = 0.9
    beta2: Beta = 0.999
    beta3: Beta = 0.999  # of the slow average
    alpha: Factor = 8.0  # final weight of the slow average
    warmup: Share = 1.0  # of the steps, over which alpha and beta3 rise
    eps: Epsilon = 1e-8


@dataclass(frozen=True, kw_only=True)
class Mars(Decoupled):
    """MARS-AdamW: variance-reduced gradients of matrices; vectors take AdamW (0.8, 0.999) at a third of `lr`."""

    beta1: Beta = 0.95
    beta2: Beta = 0.99
    gamma: Factor = 0.025  # strength of the variance reduction
    vector_lr_scale: Factor = 1 / 3  # of the learning rate of vectors
    eps: Epsilon = 1e-8


@dataclass(frozen=True, kw_only=True)
class Lion(Decoupled):
    """The sign of an interpolated momentum."""

    beta1: Beta = 0.9
    beta2: Beta = 0.99


@dataclass(frozen=True, kw_only=True)
class Muon(Decoupled):
    """Orthogonalized momentum for the matrices of the blocks; AdamW for embedding, head and vectors.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that the same `lr` suits both.
    """

    momentum: Beta = 0.95
    nesterov: bool = True
    iterations: NewtonSchulzSteps = 5
    normalize_rows: bool = False  # MuonEq-R: rows of the momentum have norm 1 before they are orthogonalized
    beta1: Beta = 0.9  # this and all below: of AdamW
    beta2: Beta = 0.95
    eps: Epsilon = 1e-8


@dataclass(frozen=True, kw_only=True)
class Fira(Decoupled):
    """Fira for the matrices whose name contains one of `patterns`, Adam for all else."""

    wd: Decay = 0.0
    # Of the subspace; None for a quarter of the model's width, the published choice.
    rank: Annotated[int, Range(1, 2**20)] | None = None
    gap: Steps = 200  # between two refreshes of the subspace
    # Scale of the low-rank update; None for 0.25 below 1e9 parameters and 0.0625 above, as published.
    alpha: Positive | None = None
    variant: Annotated[str, OneOf(FIRA_VARIANTS)] = "code"  # docs/fira.md section 1
    gamma: Positive | None = 1.01  # growth allowed to the residual per step, None for no limit
    # Of the residual: one factor per "column", or one for the whole "matrix".
    scaling: Annotated[str, OneOf(FIRA_SCALINGS)] = "column"
    # This and the next two: see `epochal.optim.fira.Fira`.
    refresh: Annotated[str, OneOf(FIRA_REFRESHES)] = "gram"
    rotate_states: bool = False
    stagger: bool = False
    patterns: Annotated[tuple[str, ...], Items()] = ("attn", "mlp")  # parts of parameter names
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Epsilon = 1e-6


SpectraBase = AdamW | Signum | AdEMAMix | Mars | Lion


@dataclass(frozen=True, kw_only=True)
class Spectra(Ranged):
    """A base optimizer whose update has its singular values clipped at `clip`; lr and wd are the base's."""

    base: SpectraBase
    clip: Positive = 10.0  # the threshold; follows the Run's warm-up
    # "2d" (every matrix, embedding and head too), "all" (also vectors, by their norm), or regular expressions
    # searched in parameter names.
    apply_to: str | tuple[str, ...] = "2d"
    operator: Annotated[str, OneOf(OPERATORS)] = "soft"
    clip_decay: Annotated[str, OneOf(CLIP_DECAYS)] = "constant"  # how the threshold decays over the last steps
    clip_decay_fraction: Share = 0.2  # of the steps, over which it decays
    # Threshold on the singular values of the gradients. The paper's README advises against using it together with
    # `clip`.
    pre_clip: Positive | None = None
    # That many of the published Newton-Schulz steps in bfloat16, instead of a clip accurate to 1%.
    iterations: NewtonSchulzSteps | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.operator != "soft":
            raise ValueError(
                f"iterations is {self.iterations}, but only the operator 'soft' iterates, and operator is "
                f"{self.operator!r}; leave iterations out."
            )
        if isinstance(self.apply_to, str):
            OneOf(APPLY_TO).checker()(self.apply_to, "apply_to")

    @property
    def lr(self) -> float:
        """Peak learning rate of the base."""
        return self.base.lr

    @property
    def wd(self) -> float:
        """Weight decay of the base."""
        return self.base.wd


# AdamW is first because a table without a `kind` means the first.
Optimizer = SpectraBase | Muon | Fira | Spectra
