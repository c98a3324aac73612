"""Scaling laws with intervals, without torch.

Start with `power.py` (one size), then `members.py` (the limit of one ensemble), `joint.py` (the double limit),
`efficiency.py` (data efficiency), `forms.py` (several sizes) and `checks.py` (can a law be trusted?).
"""

from epochal.scaling.bootstrap import bootstrap_interval
from epochal.scaling.checks import (
    aicc,
    choose,
    compare_limits,
    held_out_largest,
    leave_one_out,
    seed_caveats,
    seed_interval,
)
from epochal.scaling.efficiency import DataEfficiency, data_efficiency, law_from_constants, slowrun_multiple
from epochal.scaling.forms import CHINCHILLA, JOINT, Form, SurfaceLaw, fit_surface
from epochal.scaling.joint import JointLaw, fit_joint
from epochal.scaling.members import MembersLaw, fit_members
from epochal.scaling.power import PowerLaw, fit_power_law

__all__ = [
    "CHINCHILLA",
    "JOINT",
    "DataEfficiency",
    "Form",
    "JointLaw",
    "MembersLaw",
    "PowerLaw",
    "SurfaceLaw",
    "aicc",
    "bootstrap_interval",
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
    "seed_caveats",
    "seed_interval",
    "slowrun_multiple",
]
