"""The regularizer of a Run as a frozen dataclass: one class per kind, no torch.

A knob of zero switches a regularizer off, to the last bit. Formulas and sources are in the files of
`epochal.training.regularizers`, and docs/regularizers.md lists them. Dropout, masked inputs and weight decay are fields of
the Run itself; `Muon` has the row normalization of MuonEq-R.

To add one, write its dataclass and put it into `__all__` and `Regularizer` in this file, and its function into a file of
epochal/training/regularizers.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from epochal.ranges import LessThanAll, OneOf, Range, Ranged, Share

__all__ = [
    "EarlyLearning",
    "GradientNorm",
    "LookAhead",
    "OrthogonalStep",
    "OwnPredictions",
    "RandomTokens",
    "Regularizer",
    "SecondToken",
    "SelfTunedDecay",
    "SelfTunedDropout",
    "StableMax",
    "StochasticDepth",
]

STEPS = ("gradient", "update")
# Where a regularizer works. "any": under every preset; "whole": where each process has whole gradients, alone or under
# DDP; "one": in one process.
REACHES = ("any", "whole", "one")

Strength = Annotated[float, Range(0.0, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Base(Ranged):
    """What every kind says about itself."""

    passes: ClassVar[float] = 1.0  # forward and backward passes of a step, relative to a plain one
    reach: ClassVar[str] = "any"
    per_position: ClassVar[bool] = False  # keeps a value for every position of the text
    copies: ClassVar[int] = 0  # of the weights or gradients that a step holds, float32
    has_loss: ClassVar[bool] = False  # replaces the cross-entropy of the labels
    more_heads: ClassVar[int] = 0  # passes through the head that a plain step lacks, each after a map
    knob: ClassVar[str] = ""  # the field that switches it off at zero

    @property
    def off(self) -> bool:
        """Whether the run is the plain one."""
        return bool(self.knob) and getattr(self, self.knob) == 0


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Base):
    """Each input token is replaced by a random one with this probability; the targets stay."""

    share: LessThanAll = 0.15
    knob: ClassVar[str] = "share"


@dataclass(frozen=True, kw_only=True)
class StochasticDepth(Base):
    """Blocks are skipped with a probability that rises to `share` in the last layer."""

    share: LessThanAll = 0.05
    knob: ClassVar[str] = "share"


class PerPosition(Base):
    """A loss with a distribution for every position of the text as its state."""

    reach: ClassVar[str] = "one"
    per_position: ClassVar[bool] = True
    has_loss: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class OwnPredictions(PerPosition):
    """PS-KD: soft targets are the model's predictions of the epoch before, with a weight that rises to this."""

    weight: Share = 0.8
    knob: ClassVar[str] = "weight"


@dataclass(frozen=True, kw_only=True)
class EarlyLearning(PerPosition):
    """ELR: predictions stay near their own running average over epochs."""

    strength: Strength = 3.0
    momentum: LessThanAll = 0.7
    knob: ClassVar[str] = "strength"


@dataclass(frozen=True, kw_only=True)
class OrthogonalStep(Base):
    """The "gradient" (perpGrad) or "update" of each decayed matrix is orthogonal to it."""

    of: Annotated[str, OneOf(STEPS)] = "gradient"
    reach: ClassVar[str] = "whole"
    copies: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class LookAhead(Base):
    """First-order meta-gradient: the second half of a batch is seen after a step along the first half's gradient."""

    radius: Strength = 0.3  # L2 norm of the temporary step at the peak learning rate; it follows the schedule
    knob: ClassVar[str] = "radius"
    reach: ClassVar[str] = "one"
    copies: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Base):
    """The penalty `strength` times the L2 norm of the gradient; SAM where `strength` equals `radius`."""

    strength: Strength = 0.05
    radius: Annotated[float, Range(0.0, 1e6, above=True)] = 0.05  # of the finite difference
    knob: ClassVar[str] = "strength"
    passes: ClassVar[float] = 2.0
    reach: ClassVar[str] = "one"
    copies: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class SelfTuned(Base):
    """A number that follows its hypergradient on the tokens that the run holds out."""

    rate: Strength = 0.1  # change of its logarithm where the cosine of the two gradients is 1
    knob: ClassVar[str] = "rate"
    every: ClassVar[int] = 4  # steps between two changes
    reach: ClassVar[str] = "one"

    def due(self, step: int) -> bool:
        """Whether the number changes after this step, counted from 0."""
        return step % self.every == self.every - 1


@dataclass(frozen=True, kw_only=True)
class SelfTunedDecay(SelfTuned):
    """Weight decay follows its hypergradient."""

    passes: ClassVar[float] = 1.25  # a change costs one
    copies: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class SelfTunedDropout(SelfTuned):
    """Dropout follows its hypergradient, from that of the run on."""

    highest: ClassVar[float] = 0.6  # of the dropout, half as much more of which is tried
    passes: ClassVar[float] = 1.75  # a change costs three
    copies: ClassVar[int] = 2


@dataclass(frozen=True, kw_only=True)
class SecondToken(Base):
    """Multi-token prediction: a linear map and the shared head also predict the token after the next one."""

    weight: Strength = 0.3  # of that loss
    knob: ClassVar[str] = "weight"
    reach: ClassVar[str] = "one"
    has_loss: ClassVar[bool] = True
    more_heads: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class StableMax(Base):
    """Probabilities proportional to a function that is linear for large logits, in training and evaluation."""

    has_loss: ClassVar[bool] = True


Regularizer = (
    RandomTokens
    | StochasticDepth
    | OwnPredictions
    | EarlyLearning
    | OrthogonalStep
    | LookAhead
    | GradientNorm
    | SelfTunedDecay
    | SelfTunedDropout
    | SecondToken
    | StableMax
)
