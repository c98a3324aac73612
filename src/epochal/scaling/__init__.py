"""Scaling laws with intervals, without torch.

Start with `power.py` (one size), then `members.py` (the limit of one ensemble), `joint.py` (the double limit),
`efficiency.py` (data efficiency), `forms.py` (several sizes), `seeds.py` (one setting) and `checks.py` (can a law be
trusted?).
"""

from epochal.scaling.checks import HeldOut, LawChecks, check_law, compare_limits, held_out_largest, leave_one_out
from epochal.scaling.efficiency import DataEfficiency, data_efficiency, law_from_constants, slowrun_multiple
from epochal.scaling.forms import (
    CHINCHILLA,
    FORM_NAMES,
    JOINT,
    Form,
    SurfaceLaw,
    bryant_liu,
    fit_surface,
    named_form,
    soft_minimum,
)
from epochal.scaling.joint import JointLaw, fit_joint
from epochal.scaling.members import MembersLaw, fit_members, jackknife_error, predict_members
from epochal.scaling.posterior import Posterior
from epochal.scaling.power import Interval, PowerLaw, fit_power_law, interval_text
from epochal.scaling.seeds import gain_interval, search_noise, seed_caveats, seed_interval, welch_dof

__all__ = [
    "CHINCHILLA",
    "FORM_NAMES",
    "JOINT",
    "DataEfficiency",
    "Form",
    "HeldOut",
    "Interval",
    "JointLaw",
    "LawChecks",
    "MembersLaw",
    "Posterior",
    "PowerLaw",
    "SurfaceLaw",
    "bryant_liu",
    "check_law",
    "compare_limits",
    "data_efficiency",
    "fit_joint",
    "fit_members",
    "fit_power_law",
    "fit_surface",
    "gain_interval",
    "held_out_largest",
    "interval_text",
    "jackknife_error",
    "law_from_constants",
    "leave_one_out",
    "named_form",
    "predict_members",
    "search_noise",
    "seed_caveats",
    "seed_interval",
    "slowrun_multiple",
    "soft_minimum",
    "welch_dof",
]
