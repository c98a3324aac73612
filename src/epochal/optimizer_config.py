"""The optimizer of a Run as a frozen dataclass: one class per kind, no torch.

`lr` is the peak learning rate and `wd` the decoupled weight decay: a decayed weight shrinks by lr(t) * wd(t) per step.
Defaults are those of the published scripts (docs/fira.md section 1.5, docs/spectra.md sections 1.10 and 2.3).

To add an optimizer, write its dataclass and put it into `__all__` and `Optimizer` in this file, and write a class of
the same name in epochal/optim/<name in lower case>.py, whose keywords have the names of the dataclass's fields (wd
becomes `weight_decay`, and beta1, beta2 the pair `betas`). TOML files and records name it by `kind`.
"""

from dataclasses import dataclass

__all__ = ["AdEMAMix", "AdamW", "Fira", "Lion", "Mars", "Muon", "Optimizer", "Signum", "Spectra"]

FIRA_VARIANTS = ("code", "paper", "galore")
FIRA_SCALINGS = ("column", "matrix")
FIRA_REFRESHES = ("svd", "gram", "subspace")
CLIP_DECAYS = ("constant", "linear", "sqrt", "cosine", "square", "exp")
OPERATORS = ("soft", "hard", "normalize")


def choose(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{field} is {value!r}; choose from {', '.join(choices)}.")


def at_least(field: str, value: float, low: float) -> None:
    """Raise ValueError unless `value` is a number of at least `low`."""
    if not value >= low:  # so that NaN is refused too
        raise ValueError(f"{field} is {value}; give at least {low}.")


@dataclass(frozen=True, kw_only=True)
class Decoupled:
    """The fields of every optimizer: peak learning rate and decoupled weight decay."""

    lr: float = 1e-3
    wd: float = 0.1

    def __post_init__(self) -> None:
        at_least("lr", self.lr, 0.0)
        at_least("wd", self.wd, 0.0)
        for name in ("beta1", "beta2", "beta3", "momentum"):
            value = getattr(self, name, 0.0)
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class AdamW(Decoupled):
    """AdamW with PyTorch's decoupled decay: a decayed weight shrinks by lr(t) * wd per step."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Signum(Decoupled):
    """The sign of a Nesterov momentum."""

    momentum: float = 0.95
    nesterov: bool = True


@dataclass(frozen=True, kw_only=True)
class AdEMAMix(Decoupled):
    """Adam with a second, slow average; alpha and beta3 rise over the share `warmup` of all steps."""

    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.999  # of the slow average
    alpha: float = 8.0  # final weight of the slow average
    warmup: float = 1.0  # share of the steps over which alpha and beta3 rise
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}; give a share of the steps from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Mars(Decoupled):
    """MARS-AdamW: variance-reduced gradients of matrices; vectors take AdamW (0.8, 0.999) at a third of `lr`."""

    beta1: float = 0.95
    beta2: float = 0.99
    gamma: float = 0.025  # strength of the variance reduction
    vector_lr_scale: float = 1 / 3  # of the learning rate of vectors
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Lion(Decoupled):
    """The sign of an interpolated momentum."""

    beta1: float = 0.9
    beta2: float = 0.99


@dataclass(frozen=True, kw_only=True)
class Muon(Decoupled):
    """Orthogonalized momentum for the matrices of the blocks; AdamW for embedding, head and vectors.

    The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that the same `lr` suits both.
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5  # Newton-Schulz steps
    beta1: float = 0.9  # this and all below: of AdamW
    beta2: float = 0.95
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class Fira(Decoupled):
    """Fira for the matrices whose name contains one of `patterns`, Adam for all else."""

    wd: float = 0.0
    rank: int | None = None  # of the subspace; None for a quarter of the model's width, the published choice
    gap: int = 200  # steps between two refreshes of the subspace
    # Scale of the low-rank update; None for 0.25 below 1e9 parameters and 0.0625 above, as published.
    alpha: float | None = None
    variant: str = "code"  # "code", "paper" or "galore" (docs/fira.md section 1)
    gamma: float | None = 1.01  # growth allowed to the residual per step, None for no limit
    scaling: str = "column"  # of the residual: one factor per "column", or one for the whole "matrix"
    refresh: str = "gram"  # this and the next two: see `epochal.optim.fira.Fira`
    rotate_states: bool = False
    stagger: bool = False
    patterns: tuple[str, ...] = ("attn", "mlp")  # parts of parameter names
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("variant", self.variant, FIRA_VARIANTS)
        choose("scaling", self.scaling, FIRA_SCALINGS)
        choose("refresh", self.refresh, FIRA_REFRESHES)
        at_least("gap", self.gap, 1)
        at_least("rank", 1 if self.rank is None else self.rank, 1)


SpectraBase = AdamW | Signum | AdEMAMix | Mars | Lion


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """A base optimizer whose update has its singular values clipped at `clip`; lr and wd are the base's."""

    base: SpectraBase
    clip: float = 10.0  # the threshold; follows the Run's warm-up
    # "2d" (every matrix, embedding and head too), "all" (also vectors, by their norm), or regular expressions
    # searched in parameter names.
    apply_to: str | tuple[str, ...] = "2d"
    operator: str = "soft"  # "soft", "hard" or "normalize"
    clip_decay: str = "constant"  # how the threshold decays over the last steps
    clip_decay_fraction: float = 0.2  # the share of the steps over which it decays
    # Threshold on the singular values of the gradients. The paper's README advises against using it together with
    # `clip`.
    pre_clip: float | None = None
    # That many of the published Newton-Schulz steps in bfloat16, instead of a clip accurate to 1%.
    iterations: int | None = None

    def __post_init__(self) -> None:
        choose("operator", self.operator, OPERATORS)
        at_least("iterations", 1 if self.iterations is None else self.iterations, 1)
        if self.iterations is not None and self.operator != "soft":
            raise ValueError(
                f"iterations is {self.iterations}, but only the operator 'soft' iterates, and operator is "
                f"{self.operator!r}; leave iterations out."
            )
        choose("clip_decay", self.clip_decay, CLIP_DECAYS)
        for name in ("clip", "pre_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; give a threshold above 0.")
        if isinstance(self.apply_to, str):
            choose("apply_to", self.apply_to, ("2d", "all"))

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
