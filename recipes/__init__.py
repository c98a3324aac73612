"""One file per question: its arms, its settings, the jobs it plans and the section of the report it writes."""

# The order of a report, in which each recipe builds on those before; recipes of a working folder follow by name.
ORDER = (
    "controls",
    "best_model",
    "epoching",
    "heavy_weight_decay",
    "ensembling",
    "distillation",
    "data_efficiency",
    "downstream",
    "continued",
    "optimizers",
    "ablations",
    "optimizers_at_scale",
    "regularizers",
    "one_off_runs",
)
