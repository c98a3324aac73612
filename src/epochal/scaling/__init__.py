"""Scaling laws with intervals: what a recipe reaches in the limit, and how sure that is. Needs no torch.

Read `power.py` first (one size, one law), then `members.py` (the limit of one ensemble), `joint.py` (the double limit)
and `efficiency.py`; `checks.py` asks whether a law deserves belief, `forms.py` has laws in several sizes, `solve.py` the
arithmetic under all of them.
"""

from epochal.scaling.checks import (
    Choice,
    Comparison,
    HeldOut,
    aicc,
    choose,
    compare_limits,
    held_out_largest,
    leave_one_out,
    seed_interval,
    seed_reach,
    seed_weights,
    unsettled,
)
from epochal.scaling.efficiency import DataEfficiency, data_efficiency, law_from_constants, slowrun_multiple
from epochal.scaling.forms import (
    CHINCHILLA,
    COUPLED,
    JOINT,
    Form,
    SurfaceLaw,
    fit_surface,
    overfitting,
    power_sum,
    repetition,
    with_penalty,
)
from epochal.scaling.joint import JointLaw, NestedLimit, fit_joint
from epochal.scaling.members import MembersLaw, fit_members
from epochal.scaling.power import PowerLaw, fit_power_law

__all__ = [
    "CHINCHILLA",
    "COUPLED",
    "JOINT",
    "Choice",
    "Comparison",
    "DataEfficiency",
    "Form",
    "HeldOut",
    "JointLaw",
    "MembersLaw",
    "NestedLimit",
    "PowerLaw",
    "SurfaceLaw",
    "aicc",
    "choose",
    "compare_limits",
    "data_efficiency",
    "fit_joint",
    "fit_members",
    "fit_power_law",
    "fit_surface",
    "held_out_largest",
    "law_from_constants",
    "leave_one_out",
    "overfitting",
    "power_sum",
    "repetition",
    "seed_interval",
    "seed_reach",
    "seed_weights",
    "slowrun_multiple",
    "unsettled",
    "with_penalty",
]
