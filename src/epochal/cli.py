"""The command line: `epochal data | plan | run | report | train | eval | generate | export | doctor`.

Exit codes: 0 done, 1 a job failed, 2 wrong use, 75 stopped early on purpose: run again to continue.
"""

# Imports that are not needed for --help stand in the functions: `epochal --help` must answer fast, and only commands that
# compute may load torch.
import contextlib
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epochal.config import REPOSITORY, find_config, from_table, nearest, read_json, seconds
from epochal.stopping import EXIT_STOPPED, Stopped, listen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from epochal.campaign.cluster import ClusterCampaign
    from epochal.campaign.plan import Cost, CostEstimate, SearchState
    from epochal.campaign.worker import WorkerConfig
    from epochal.data.store import TokenStore
    from epochal.records import Record, Records
    from epochal.report.sections import Section
    from epochal.run import Job, Run
    from epochal.scale import Hardware, Scale

app = typer.Typer(
    invoke_without_command=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ScaleName = Annotated[str, typer.Option("--scale", help="A scale from configs/scales, or the path of one.")]
Results = Annotated[Path, typer.Option(help="Folder of records and reports; commit it.")]
Work = Annotated[Path, typer.Option(help="Folder of token stores, checkpoints and models.")]
Recipes = Annotated[list[str] | None, typer.Argument(help="Recipes; all if none is named.")]

RESULTS, WORK = Path("recipes/results"), Path("work")
TRACKERS = ("tensorboard", "trackio", "wandb")


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    # deepspeed's launcher passes it; the environment has the same number.
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Pre-training recipes for finite text and unlimited compute."""
    if version:
        from importlib import metadata

        print(f"epochal {metadata.version('epochal')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error of the user is printed as one sentence."""
    _drop_launcher_variables()
    try:
        app()
    except ValueError as error:
        _fail(str(error), 2)
    except ModuleNotFoundError as error:
        _fail(f"the package {error.name!r} is missing; run pip install {error.name}.", 2)
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        _fail(f"{path}{error.strerror or error}; free some space or check the path, then run again.", 1)


def _drop_launcher_variables() -> None:
    """Ignore a launcher's variables in the shell, unless a launcher started this process."""
    from epochal.campaign.environment import launcher_variables
    from epochal.distributed.launcher import ERROR_FILE_VARIABLE
    from epochal.distributed.started_by import launcher

    # A worker has cleaned the environment of the processes that it launches.
    if launcher(os.environ) or ERROR_FILE_VARIABLE in os.environ:
        return
    dropped = [name for name in launcher_variables(os.environ) if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    for name in launcher_variables(os.environ):
        del os.environ[name]
    if dropped:
        print(f"epochal: {', '.join(dropped)} in the environment are ignored: no launcher runs this.", file=sys.stderr)


def _fail(message: str, code: int) -> None:
    print(f"epochal: {message}", file=sys.stderr)
    sys.exit(code)


# --- data and plan ---------------------------------------------------------------------------------------------------


@app.command()
def data(config: str, work: Work = WORK) -> None:
    """Turn text into a token store.

    CONFIG is a name from configs/data or a path.
    """
    from epochal.data.text import sentences

    store = _prepared(config, work / "data")
    counts = ", ".join(f"{split} {count:,}" for split, count in store.meta["tokens"].items())
    dropped = ", ".join(f"{count} {what}" for what, count in store.meta["dropped"].items())
    print(f"{store.folder}: vocabulary {store.vocab_size:,}; tokens: {counts}; dropped: {dropped}")
    for line in (*sentences(store.meta["changed"], store.meta["first"]), *store.meta["notes"]):
        print(f"  {line}")


def _prepared(config: str, folder: Path) -> "TokenStore":
    """Open the token store of a data config, or build it.

    Fails in seconds if it needs the hub and cannot reach it.
    """
    from epochal.data.prepare import prepare
    from epochal.offline import go_offline_if_unreachable

    path = find_config("data", config, ".toml")
    if not (folder / path.stem).exists() and _names_a_hub(path):
        go_offline_if_unreachable()
    return prepare(config, folder)


def _names_a_hub(path: Path) -> bool:
    """Whether a data config reads text or a tokenizer from the hub."""
    from epochal.config import load_toml
    from epochal.data.prepare import DataConfig

    config = load_toml(path, DataConfig)
    tokenizer = config.tokenizer.path
    hub = any(source.hub is not None for source in (config.source, *config.more))
    return hub or (tokenizer is not None and not Path(tokenizer).exists())


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the new data config and scale.")],
    text: Annotated[list[str], typer.Argument(help="Files, folders or patterns.")],
    hours: Annotated[float | None, typer.Option(min=0.001, max=10_000, help="Time of the campaign.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, max=600_000, help="The same in minutes.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or gpu: one GPU.")] = "cpu",
    start: Annotated[
        str, typer.Option(help="A model to go on from: a folder, or a name on the Hugging Face hub.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the configs of this name.")] = False,
    work: Work = WORK,
) -> None:
    """Choose a campaign for a text and a time.

    Writes configs/data/NAME.toml and configs/scales/NAME.toml, and says why.
    """
    from epochal.campaign.init import Request
    from epochal.campaign.init import init as write

    if (hours is None) == (minutes is None):
        raise ValueError("the time of the campaign is missing or given twice; give --hours H or --minutes M.")
    if device not in ("cpu", "gpu"):
        raise ValueError(f"--device must be cpu or gpu, got {device!r}.")
    seconds_ = 3600 * hours if hours is not None else 60 * (minutes or 0.0)
    request = Request(name=name, files=tuple(text), seconds=seconds_, device=device, work=work, start=start)
    print(*write(request, force=force), sep="\n")


@app.command()
def plan(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    results: Results = RESULTS,
    work: Work = WORK,
    jobs: Annotated[bool, typer.Option("--jobs", help="List every job by name.")] = False,
    searches: Annotated[
        bool, typer.Option("--searches", help="List every search, including finished ones and those not started.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show running jobs, also on a cluster, until all are done.")
    ] = False,
    every: Annotated[str, typer.Option(help="With --watch: refresh interval.")] = "5s",
    decide: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two runs or two arms: how many more seeds or sizes settle which is better."),
    ] = None,
) -> None:
    """Show which jobs are done, ready and waiting, and what they cost. Changes nothing."""
    from epochal.campaign.plan import few_documents, recipe_names, store_vocab_size

    setting, records = _load(scale, results, work, problems=not watch)
    if decide is not None:
        _print_decisions(*decide, records, setting)
        return
    names = tuple(recipes or recipe_names(setting))
    if watch:
        _launch_module("watch").watch(names, records.workspace, setting, every=seconds(every))
        return
    estimate = _estimate(names, records, setting)
    status, hardware = estimate.status, setting.hardware
    print(f"{setting.name}: {len(status.done)} done, {len(status.ready)} ready, {len(status.waiting)} waiting")
    for line in _standing(setting, records):
        print(f"  {line}")
    for title, cost in (
        ("planned", estimate.today),
        ("estimated remaining (if each search is already at its optimum)", estimate.later),
    ):
        compute = f"{cost.flops:.2e} FLOPs, about {_hours(cost, hardware)}"
        print(f"  {title}: {cost.jobs} jobs, {compute}, {cost.disk / 1e9:,.2f} GB of models")
    for line in _memory_lines(estimate.largest, setting, store_vocab_size(records.workspace, setting)):
        print(line)
    for line in _search_lines(estimate.searches, hardware, all_searches=searches):
        print(line)
    for line in few_documents((*status.done, *status.ready), records.workspace):
        print(f"  note: {line}")
    if jobs:
        for job in status.ready:
            print(f"  ready    {job.name}")
        for name, sources in status.waiting.items():
            print(f"  waiting  {name}  for {', '.join(sources)}")


def _print_decisions(first: str, second: str, records: "Records", scale: "Scale") -> None:
    from epochal.campaign.decide import decide
    from epochal.campaign.plan import store_vocab_size

    for decision in decide(first, second, records, scale, store_vocab_size(records.workspace, scale)):
        print(decision.now)
        for option in decision.options:
            cost = f"{option.cost.jobs} runs, {option.cost.flops:.2e} FLOPs, {_hours(option.cost, scale.hardware)}"
            print(f"  {option.what}: settle it with probability {option.probability:.2f}; {cost}")
        if decision.options:
            best = decision.cheapest
            print(f"  cheapest with probability 0.8: {best.what if best else 'none of these'}")


def _memory_lines(runs: "Sequence[Run]", setting: "Scale", vocab_size: int | None) -> list[str]:
    """Format which micro-batch of the largest model fits; nothing for unknown devices."""
    from dataclasses import replace

    from epochal.distributed.memory import describe_fitting, device_bytes

    size = device_bytes(setting.hardware.device)
    if size is None or not runs:
        return []
    largest = replace(runs[0], model=setting.models[-1])
    return [f"  {describe_fitting(largest, size, world=setting.hardware.devices, vocab_size=vocab_size)}"]


def _standing(setting: "Scale", records: "Records") -> list[str]:
    """Say how much of the text a campaign uses; nothing before the text was prepared."""
    from epochal.campaign.plan import store_meta
    from epochal.search.regime import Text, cautions

    meta = store_meta(records.workspace, setting)
    if meta is None:
        return []
    tokens, documents, largest = meta["tokens"]["train"], meta["documents"]["train"], max(setting.unique_tokens)
    text = Text(documents=documents, tokens=tokens, bytes=0)
    share = f"largest D: {largest:,} of {tokens:,} training tokens ({largest / tokens:.1%}), {documents:,} documents"
    return [share, *cautions(text, meta["vocab_size"], largest)]


def _hours(cost: "Cost", hardware: "Hardware") -> str:
    """Format hours on the scale's hardware, and device-hours if it has several devices."""
    device_hours = f" ({cost.hours * hardware.devices:,.1f} device-hours)" if hardware.devices > 1 else ""
    hours = f"{cost.hours:,.2f} hours" if cost.hours >= 0.05 else f"{60 * cost.hours:.1f} minutes"
    return f"{hours} of {hardware.device}{device_hours}"


def _search_lines(searches: "Sequence[SearchState]", hardware: "Hardware", *, all_searches: bool) -> list[str]:
    """Format each search: its state, the cost of its next round, a bound on the gain."""
    if not searches:
        return []
    certified, new = sum(search.certified for search in searches), sum(not search.begun for search in searches)
    hint = "" if all_searches or not certified + new else " (--searches lists all)"
    lines = [f"  searches: {certified} of {len(searches)} certified, {new} not started{hint}"]
    shown = [search for search in searches if all_searches or (search.begun and not search.certified)]
    width = max((len(search.what) for search in shown), default=0)
    for search in shown:
        cost, next_round, finer = search.next_round, "", ""
        if cost.jobs:
            gain = "no bound on the gain yet" if search.gain is None else f"gain at most {search.gain:.4f} nats"
            next_round = f"; next {cost.jobs} job{'s' * (cost.jobs > 1)}, {_hours(cost, hardware)}, {gain}"
        if search.certified and search.finer is not None:
            finer = f"; a finer grid could gain {search.finer:.4f} nats"
        lines.append(f"    {search.what:{width}}  {search.state}{next_round}{finer}")
    return lines


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Workers on this machine, each with a share of the cores or one GPU. Default: devices in [hardware] of "
            "the scale; 1 with --preset.",
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Parallelism preset (configs/accelerate).")] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, max=10**7, help="Sequences per forward pass and process.")
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="How runs compute: compile, cuda-graph, deterministic, fused, recompute; may be repeated."),
    ] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio, wandb or none. Default: tensorboard if installed.")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Save and stop after this time, e.g. 9m or 2h; run again to continue.")
    ] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Longest time between two checkpoints.")] = "5m",
    rank_timeout: Annotated[
        str, typer.Option(help="With --preset: end a run when a process has not answered for this time.")
    ] = "30m",
    cluster: Annotated[
        str | None, typer.Option(help="Run on a Slurm cluster: a name from configs/cluster, or a path.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --cluster: print the sbatch files only.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="With --cluster: cancel the campaign.")] = False,
    results: Results = RESULTS,
    work: Work = WORK,
) -> None:
    """Run the missing jobs of recipes.

    Several starts share the work; a stopped one continues when run again.
    """
    import time
    import uuid
    from dataclasses import replace

    started = time.monotonic()
    if cluster is None:
        listen()  # from here on a signal is a request to stop, also while the campaign is still being planned
    from epochal.campaign.cluster import cluster_campaign, load_cluster
    from epochal.campaign.environment import usable_cores
    from epochal.campaign.plan import recipe_names
    from epochal.campaign.worker import WorkerConfig
    from epochal.scale import load_scale

    if cluster is None and (dry_run or stop):
        raise ValueError("--dry-run and --stop need --cluster NAME.")
    if cluster is not None and (jobs is not None or time_limit is not None):
        raise ValueError(
            "--jobs and --time-limit are for this machine; set pack, parallel and time_limit in the cluster file."
        )
    setting = load_scale(scale)
    # With a preset a run takes all devices.
    workers = jobs or (1 if preset is not None or cluster is not None else setting.hardware.devices)
    config = WorkerConfig(
        session=uuid.uuid4().hex,
        scale=scale,
        recipes=tuple(recipes or recipe_names(setting)),
        results=str(results),
        work=str(work),
        threads=max(1, len(usable_cores()) // workers),
        preset=None if preset is None else _preset_path(preset),
        micro_batch=micro_batch,
        modes=tuple(mode or ()),
        trackers=_trackers(tracker),
        checkpoint_seconds=seconds(checkpoint_every),
        rank_timeout=seconds(rank_timeout),
        seconds_left=None if time_limit is None else seconds(time_limit),
    )
    campaign = None if cluster is None else cluster_campaign(config, load_cluster(cluster))
    if campaign is not None:
        config = campaign.config
    # Before any worker starts: an error in a config should show in seconds, not in a log.
    if not stop:
        _check_options(config, setting, 1 if campaign is None else campaign.cluster.nodes)
    if campaign is not None:
        # Text is prepared to submit only: batch files and --stop need neither it nor the packages that it comes from.
        if not (dry_run or stop):
            _check_campaign(config)
        _run_on_cluster(campaign, dry_run=dry_run, stop=stop)
    else:
        estimate = _check_campaign(config)
        if config.seconds_left is not None:  # planning and the preparation of the text count
            config = replace(config, seconds_left=max(0.0, config.seconds_left + started - time.monotonic()))
        _run_here(config, estimate, workers)


def _preset_path(name: str) -> str:
    from epochal.distributed.presets import read_launch_file

    path = find_config("accelerate", name, ".yaml")
    read_launch_file(path)
    return str(path)


def _check_options(config: "WorkerConfig", setting: "Scale", nodes: int) -> None:
    """Check modes, processes and micro-batch, for which no record and no text is read."""
    from epochal.campaign.plan import AssumeAllDone, campaign_jobs
    from epochal.distributed.presets import check_micro_batch, processes_of, read_preset
    from epochal.records import Records
    from epochal.run import Run

    read_preset({}, config.modes)
    each = 1 if config.preset is None else processes_of(Path(config.preset))
    if nodes * each == 1 and config.micro_batch is None:
        return  # any batch fits
    # A recipe may have batches of its own, so all runs count, not only the next ones.
    jobs = campaign_jobs(config.recipes, AssumeAllDone(Records(config.workspace)), setting)
    for batch, name in {job.batch_size: job.name for job in jobs if isinstance(job, Run)}.items():
        if batch % (nodes * each):
            raise ValueError(
                f"run {name!r} of scale {setting.name!r} has a batch_size of {batch} sequences, which {nodes * each} "
                f"processes ({nodes} {'node' if nodes == 1 else 'nodes'} of {each}) cannot share; use fewer processes or "
                "nodes, or another batch_size."
            )
        check_micro_batch(config.micro_batch, batch // (nodes * each))


def _check_campaign(config: "WorkerConfig") -> "CostEstimate":
    """Check records and token stores, which are built if missing; returns the campaign's cost."""
    setting, records = _load(config.scale, Path(config.results), Path(config.work))
    # Before the estimate, which needs the size of the vocabulary.
    stores = {setting.data: _prepared(setting.data, records.workspace.data)}
    estimate = _estimate(config.recipes, records, setting)
    for run in estimate.largest:
        # Opening checks the hashes; the largest run shows whether there is enough text.
        store = stores.get(run.data) or _prepared(run.data, records.workspace.data)
        store.training_stream(run)
        store.sequences("validation", run.sequence_length)
    return estimate


def _trackers(names: list[str] | None) -> tuple[str, ...]:
    """Check the trackers for accelerate; by default TensorBoard if it is installed."""
    if names is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    chosen = tuple(name for name in names if name != "none")
    for name in chosen:
        if name not in TRACKERS:
            raise ValueError(f"tracker {name!r} is unknown; choose from {', '.join(TRACKERS)}, none.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracker {name!r} is not installed; run pip install {name}.")
    if "wandb" in chosen and not _wandb_has_a_key():
        raise ValueError("tracker 'wandb' has no key on this machine; run wandb login, or set WANDB_MODE=offline.")
    return chosen


def _wandb_has_a_key() -> bool:
    """Whether wandb can log without asking: a key where it looks for one, or no need of one."""
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_here(config: "WorkerConfig", estimate: "CostEstimate", jobs: int) -> None:
    from rich.console import Console

    from epochal.campaign.display import Display
    from epochal.campaign.executor import run_campaign
    from epochal.records import load_records

    flops, done = estimate.today.flops + estimate.later.flops, len(estimate.status.done)
    records = load_records(config.workspace)
    losses = [record.results.get("loss") for job in estimate.status.done if (record := records.get(job))]
    display = Display(
        Console(),
        config.workspace,
        done=done,
        flops_to_do=flops,
        total=done + estimate.today.jobs + estimate.later.jobs,
        best=min((loss for loss in losses if loss is not None), default=None),
    )
    with display:
        code = run_campaign(config, jobs=jobs, progress=display)
    if code == EXIT_STOPPED:
        print("stopped on purpose; run the same command again to continue.")
    elif code == 0:
        report(scale=config.scale, results=Path(config.results), work=Path(config.work), out=None)
    raise typer.Exit(code)


def _run_on_cluster(campaign: "ClusterCampaign", *, dry_run: bool, stop: bool) -> None:
    """Submit a campaign to a cluster, print its sbatch files, or cancel it."""
    from epochal.campaign.plan import campaign_jobs, ready_jobs

    config, submit = campaign.config, _launch_module("submit")
    if dry_run:
        setting, records = _load(config.scale, Path(config.results), Path(config.work))
        ready = ready_jobs(campaign_jobs(config.recipes, records, setting), records)
        print("\n".join(submit.preview(campaign, ready)), end="")
    else:
        print(submit.stop(campaign) if stop else submit.submit(campaign))


# --- report ----------------------------------------------------------------------------------------------------------


@app.command()
def report(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    results: Results = RESULTS,
    work: Work = WORK,
    records: Annotated[
        Path | None,
        typer.Option(help="A CSV instead of a scale: recipe, loss, and any of N_params, D_tokens, K, T_tokens."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --records: the recipe that others are compared with. Default: the first.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="With --records: law in N and D, chinchilla, soft-minimum or bryant-liu.")
    ] = "chinchilla",
    against: Annotated[
        str | None, typer.Option(help="Compare with another scale, or with the results folder of one.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report. Default: next to the records or CSV.")] = None,
) -> None:
    """Turn records into a report.

    It is report.md, report.html, claims.json and figures. Needs no torch.
    """
    from rich.console import Console

    from epochal.campaign.plan import named_roles, naming_recipes
    from epochal.report.overview import overview, sampled_text
    from epochal.report.terminal import print_summary
    from epochal.report.write import write_report

    first = None
    if records is not None:
        sections, summary = _point_report(records, reference, form)
        title, folder = f"epochal: {records.name}", records.with_name(f"{records.stem}-report")
    elif against is not None:
        title, folder, sections, summary = _comparison_report(recipes, scale, against, results, work)
    else:
        setting, found, sections, summary = _campaign_report(recipes, scale, results, work)
        title, folder = f"epochal: {setting.name}", results / setting.name
        # A campaign that only compares has no best models.
        if naming_recipes(setting):
            sample = sampled_text(found, setting.data)
            first = overview(found, named_roles(found, setting), sections, scale=scale, sample=sample)
    command_scale = scale if records is None else ""
    path = write_report(sections, out or folder, title=title, summary=summary, scale=command_scale, overview=first)
    print_summary(sections, Console())
    print(f"report: {path}")


def _point_report(path: Path, reference: str | None, form: str) -> "tuple[list[Section], list[str]]":
    from epochal.report.point_laws import point_sections
    from epochal.report.points import question_points, read_points

    points, problems = read_points(path)
    _print_problems(problems)
    questions = question_points(points)
    for question in questions:
        print(f"epochal: {question}", file=sys.stderr)
    left_out = f" {len(problems)} rows were left out." * bool(problems)
    summary = [f"{len(points)} points.{left_out} Intervals are 90%.", *questions]
    return point_sections(points, reference=reference, form=form), summary


def _campaign_report(
    recipes: list[str] | None, scale: str, results: Path, work: Path
) -> "tuple[Scale, Records, list[Section], list[str]]":
    """Return a campaign's scale, records, sections and the summary lines of its report."""
    from dataclasses import replace

    from epochal.campaign.plan import load_recipe, recipe_names
    from epochal.report.claims import without_paper
    from epochal.study import Study

    setting, records = _load(scale, results, work)
    if not len(records):
        raise ValueError(f"{records.workspace.records} holds no records; run epochal run --scale {scale} first.")
    study = Study(records, setting)
    sections = [
        replace(section, command=f"epochal run {name} --scale {scale}")
        for name in recipes or recipe_names(setting)
        if (section := load_recipe(name).report(study)) is not None
    ]
    if not setting.replicates:
        sections = [replace(one, claims=tuple(map(without_paper, one.claims))) for one in sections]
    budgets = ", ".join(f"{tokens:,}" for tokens in setting.unique_tokens)
    left_out = f" {len(records.problems)} malformed ones were left out." * bool(records.problems)
    summary = [
        f"Data: {setting.data}; unique training tokens D: {budgets}; sequences of {setting.sequence_length} tokens.",
        f"{len(records)} records.{left_out} Losses are nats per token on the validation split; intervals are 90%.",
    ]
    return setting, records, sections, summary


def _comparison_report(
    recipes: list[str] | None, scale: str, against: str, results: Path, work: Path
) -> "tuple[str, Path, list[Section], list[str]]":
    """Return title, folder, sections and summary lines of a comparison of two campaigns."""
    from epochal.report.campaigns import CampaignReport, compare_campaigns

    # `against` is a scale, or a folder that holds the records of one.
    folder = Path(against)
    other_results, other_scale = (folder.parent, folder.name) if (folder / "records").is_dir() else (results, against)
    setting, records, sections, _ = _campaign_report(recipes, scale, results, work)
    other, other_records, other_sections, _ = _campaign_report(recipes, other_scale, other_results, work)
    names = (setting.name, other.name)
    if other.name == setting.name:
        names = (f"{setting.name} here", f"{other.name} there")
    sections = compare_campaigns(
        CampaignReport(names[0], setting.data, records, sections),
        CampaignReport(names[1], other.data, other_records, other_sections),
    )
    counts = f"{len(records)} records of {names[0]}, {len(other_records)} of {names[1]}"
    summary = [f"{counts} (from {other_results / other.name}). Losses are nats per token; intervals are 90%."]
    title = f"epochal: {names[0]} against {names[1]}"
    return title, results / setting.name / f"against-{other.name}", sections, summary


# --- train -----------------------------------------------------------------------------------------------------------


@app.command()
def train(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="RUN | FIELD=VALUE...", help="A run by name, a run.json, or with --like fields."),
    ],
    like: Annotated[
        str | None, typer.Option(help="Train this run with other fields, for example optimizer.clip=5.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=1000, help="With --like: number of seeds, counted from the scale's first.")
    ] = 1,
    preset: Annotated[
        str | None, typer.Option(help="With torchrun or deepspeed: a preset (configs/accelerate).")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences per forward pass and process.")] = None,
    tracker: Annotated[list[str] | None, typer.Option(help="tensorboard, trackio or wandb. Default: none.")] = None,
    scale: ScaleName = "demo",
    results: Results = RESULTS,
    work: Work = WORK,
) -> None:
    """Train one run, on one process or on those of a launcher.

    accelerate launch, torchrun or deepspeed start this command on every process: torchrun --nproc-per-node 8 -m epochal
    train RUN.
    """
    import logging

    from epochal.campaign.worker import STOP_NOTE, WorkerConfig, ended_when_stuck, write_error_file
    from epochal.distributed.launcher import parent_of

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if like is None and (len(arguments) > 1 or seeds > 1):
        raise ValueError(f"{' '.join(arguments)!r} must be one run; to change fields or seeds, name a run with --like.")
    config = WorkerConfig(
        session="",
        scale=scale,
        recipes=(),
        results=str(results),
        work=str(work),
        threads=1,
        micro_batch=micro_batch,
        trackers=_trackers(tracker or ["none"]),
    )
    launched = like is None and arguments[0].endswith(".json")
    runs: list[Job]
    note: dict[str, str] = {}
    if launched:
        run, config = _read_run_json(Path(arguments[0]))
        runs = [run]
    elif like is not None:
        runs, note = _runs_like(like, arguments, seeds, scale, results, work)
    else:
        runs = [_find_job(arguments[0], scale, results, work)]
    if not runs:
        return
    if not launched:
        from dataclasses import replace

        from epochal.distributed.started_by import use_preset

        config = replace(config, preset=use_preset(preset, os.environ))
        _prepare_process()
    folder = config.workspace.folder(runs[0].name)
    # Processes on other nodes get no signal, but see the file; without their launcher they stop.
    listen(stop_file=folder / STOP_NOTE if launched else None, parent=parent_of(os.environ) if launched else None)
    stuck = ended_when_stuck(folder, config.grace_seconds) if launched else contextlib.nullcontext()
    try:
        for run in runs:
            with stuck, _claimed(run, config, launched=launched):
                _train_and_record(run, config, note, shown=not launched and os.environ.get("RANK", "0") == "0")
    except Stopped as stopped:
        print(f"epochal: {stopped}; run again to continue.", file=sys.stderr)
        _exit(EXIT_STOPPED)
    except Exception as error:
        if launched:
            # The worker that launched these processes reports the error.
            write_error_file(folder, error)
        if not isinstance(error, ValueError):
            raise
        print(f"epochal: {error}", file=sys.stderr)
        _exit(2)
    _exit(0)


def _runs_like(
    name: str, assignments: list[str], seeds: int, scale: str, results: Path, work: Path
) -> "tuple[list[Job], dict[str, str]]":
    """Print what differs from a run; returns the runs that have no record yet, and what their records say of it."""
    from epochal.campaign.one_off import described, runs_like
    from epochal.run import Run

    like = _find_job(name, scale, results, work)
    if not isinstance(like, Run):
        raise ValueError(f"{name!r} is {type(like).__name__}, not a run; name a run.")
    setting, records = _load(scale, results, work, problems=False)
    runs = runs_like(like, assignments, seeds, setting)
    note = {"name": like.name, "changes": described(runs[0], like)}
    print(f"like {like.name}: {note['changes']}")
    for run in runs:
        if records.get(run) is not None:
            print(f"{run.name} has a record already")
    return [run for run in runs if records.get(run) is None], note


def _read_run_json(path: Path) -> "tuple[Job, WorkerConfig]":
    """Read the run.json that a worker wrote for the processes it launches."""
    from epochal.campaign.worker import WorkerConfig
    from epochal.run import Run

    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the run.json of a run.")
    try:
        table = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from None
    for key in ("run", "config"):
        if key not in table:
            raise ValueError(f"{path} has no {key!r}; give the run.json that a worker wrote into the folder of a run.")
    job = from_table(table["run"], Run, where=f"{path}: run")
    return job, from_table(table["config"], WorkerConfig, where=f"{path}: config")


def _find_job(name: str, scale: str, results: Path, work: Path) -> "Job":
    """Return a job by name, from its record or the plan of all recipes."""
    from epochal.campaign.plan import campaign_jobs, recipe_names

    setting, records = _load(scale, results, work, problems=False)
    record = records.named(name)
    if record is not None:
        return record.job
    jobs = {job.name: job for job in campaign_jobs(recipe_names(setting), records, setting)}
    if name not in jobs:
        raise ValueError(f"scale {setting.name!r} plans no job {name!r}{nearest(name, jobs)}; see epochal plan --jobs.")
    return jobs[name]


def _prepare_process() -> None:
    """Let torch use this process's share of the cores. OMP_NUM_THREADS, if set, decides instead."""
    import torch
    from transformers.utils import logging

    from epochal.campaign.environment import usable_cores
    from epochal.distributed.started_by import local_processes

    logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(usable_cores()) // local_processes(os.environ)))


def _progress(job: "Job", config: "WorkerConfig", *, shown: bool) -> contextlib.AbstractContextManager[Any]:
    """Show the progress of a run while it trains in this process."""
    from rich.console import Console

    from epochal.campaign.display import RunDisplay
    from epochal.campaign.plan import store_vocab_size
    from epochal.run import Run
    from epochal.scale import load_scale

    if not shown or not isinstance(job, Run):
        return contextlib.nullcontext()
    vocab_size = store_vocab_size(config.workspace, load_scale(config.scale))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return RunDisplay(Console(stderr=True), config.workspace, job, vocab_size=vocab_size, processes=processes)


@contextlib.contextmanager
def _claimed(job: "Job", config: "WorkerConfig", *, launched: bool) -> "Iterator[None]":
    """Hold the claim of a job; raises ValueError if another process runs it."""
    from epochal.campaign.worker import claim, claim_of_rank

    if launched:  # the worker has the claim; each rank keeps it, should worker and launcher be killed
        with claim_of_rank(config.workspace, job.name):
            yield
        return
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with claim(config.workspace, job) as claimed:
        if not claimed:
            raise ValueError(f"{job.name!r} is being trained by another process; wait for it, or stop it first.")
        yield


def _train_and_record(job: "Job", config: "WorkerConfig", like: dict[str, str], *, shown: bool) -> None:
    from dataclasses import replace

    from epochal.campaign.integrity import quarantine_corrupt_inputs
    from epochal.campaign.worker import execute, finish
    from epochal.records import load_records

    records = load_records(config.workspace)
    if os.environ.get("RANK", "0") == "0":
        messages = quarantine_corrupt_inputs(job, records)
        if messages:
            raise ValueError(f"{' '.join(messages)} Run epochal run to make it again.")
    with _progress(job, config, shown=shown):
        record = execute(job, config)
    if record is not None:  # rank 0
        if like:
            record = replace(record, provenance={**record.provenance, "like": like})
        path = finish(record, config.workspace, records)
        print(f"{path}: {record.status}, loss {record.loss:.4f}")


def _exit(code: int) -> None:
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Skip all destructors: that of a gloo group joins threads that may wait for the interpreter lock, and hangs.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


# --- eval, generate, export, doctor ----------------------------------------------------------------------------------


@app.command(name="eval")
def evaluate(
    name: Annotated[str, typer.Argument(help="A finished run or ensemble; with --tasks also an exported folder.")],
    scale: ScaleName = "demo",
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, e.g. arc_easy,piqa,sciq; offline: cloze,next_passage.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="A folder of your own lm-eval task files.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Use only the first questions of each task.")
    ] = None,
    results: Results = RESULTS,
    work: Work = WORK,
) -> None:
    """Compute validation and test loss from the weights.

    With --tasks the zero-shot accuracy on lm-eval tasks.
    """
    _prepare_process()
    if tasks is None:
        _print_losses(name, scale, results, work)
    else:
        _print_accuracies(name, tasks.split(","), scale, results, work, task_folder, limit)


def _print_losses(name: str, scale: str, results: Path, work: Path) -> None:
    from dataclasses import replace

    from epochal.evaluation.ensembles import evaluate_ensemble
    from epochal.run import Ensemble, Run

    record, records = _intact(name, scale, results, work)
    name, job = record.job.name, record.job
    if isinstance(job, Run):
        job = Ensemble(name=name, runs=(name,), average="probs")
    if not isinstance(job, Ensemble):
        raise ValueError(f"{name!r} must be a run or an ensemble, got {type(job).__name__}.")
    with _evaluation_progress() as shown:
        losses = evaluate_ensemble(replace(job, tasks=()), records.workspace, records, shown=shown).results
    print(f"validation: {losses['loss']:.6f} nats per token (record: {record.loss:.6f})")
    print(f"test: {losses.get('test_loss', math.nan):.6f}")


@contextlib.contextmanager
def _evaluation_progress() -> "Iterator[Callable[[str, int, int], None]]":
    """Show which member is evaluated, how many there are, and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, Any] = {}

        def shown(split: str, tokens: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(f"{split}, tokens", total=total)
            progress.advance(tasks[split], tokens)

        yield shown


def _print_accuracies(
    name: str, tasks: list[str], scale: str, results: Path, work: Path, task_folder: Path | None, limit: int | None
) -> None:
    """Print the accuracy on each task and their mean, the paper's measure."""
    from transformers.utils import logging

    from epochal.evaluation.downstream import open_model, score
    from epochal.evaluation.offline_tasks import TASKS
    from epochal.offline import go_offline_if_unreachable

    if set(tasks) - set(TASKS):
        go_offline_if_unreachable()
    logging.disable_progress_bar()
    if (Path(name) / "config.json").is_file():
        _, records = _load(scale, results, work, problems=False)
    else:
        record, records = _intact(name, scale, results, work)
        name = record.job.name
    model, tokenizer, store = open_model(name, records.workspace, records)
    accuracies = score(model, tokenizer, tasks, store=store, task_folder=task_folder, limit=limit)
    for task, accuracy in accuracies.items():
        print(f"{task}: {accuracy.value:.2%} +- {accuracy.error:.2%} ({accuracy.questions} questions)")
    if len(accuracies) > 1:
        print(f"mean: {sum(accuracy.value for accuracy in accuracies.values()) / len(accuracies):.2%}")


@app.command()
def generate(
    name: str,
    scale: ScaleName = "demo",
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=2**24, help="Tokens to sample.")] = 256,
    seed: int = 0,
    temperature: float = 1.0,
    results: Results = RESULTS,
    work: Work = WORK,
) -> None:
    """Print text sampled from a finished run or ensemble.

    Of an ensemble the predictions are averaged.
    """
    from epochal.evaluation.downstream import continue_text
    from epochal.generation.sample import sample_texts
    from epochal.run import Samples

    record, records = _intact(name, scale, results, work)
    name = record.job.name
    samples = Samples(
        name="text",
        source=name,
        tokens=tokens,
        max_length=max(2, tokens),
        seed=seed,
        temperature=temperature,
        # The distribution of the ensemble itself; text for students comes from its members.
        draw="average",
    )
    if prompt is None:
        print(*sample_texts(samples, records.workspace, records), sep="\n")
    else:
        print(continue_text(prompt, samples, records.workspace, records))


@app.command()
def export(
    name: str,
    folder: Path,
    scale: ScaleName = "demo",
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write model.gguf, for llama.cpp.")] = False,
    results: Results = RESULTS,
    work: Work = WORK,
) -> None:
    """Write a finished run or ensemble as a Hugging Face model.

    FOLDER is new; it also gets a model card and the record.
    """
    from epochal.export.huggingface import export as write
    from epochal.export.huggingface import loading_lines

    record, records = _intact(name, scale, results, work)
    name = record.job.name
    write(name, folder, records.workspace, records, gguf=gguf)
    print(f"{folder}: transformers 4.57 or later loads it:")
    print(f"from transformers import AutoModelForCausalLM, AutoTokenizer\n{loading_lines(record, str(folder))}")


@app.command()
def doctor() -> None:
    """Show what is installed, what works and what to do next."""
    from epochal.doctor import examine

    raise typer.Exit(examine())


# --- shared ----------------------------------------------------------------------------------------------------------


def _load(scale: str, results: Path, work: Path, *, problems: bool = True) -> "tuple[Scale, Records]":
    """Load a scale and its records; prints the malformed records unless `problems` is False."""
    from epochal.records import Workspace, load_records
    from epochal.scale import load_scale

    setting = load_scale(scale)
    records = load_records(Workspace(setting.name, results, work))
    if problems:
        _print_problems(records.problems)
    return setting, records


def _print_problems(problems: tuple[str, ...]) -> None:
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} malformed records were left out.", file=sys.stderr)


def _estimate(recipes: "Sequence[str]", records: "Records", setting: "Scale") -> "CostEstimate":
    from epochal.campaign.plan import cost_estimate, store_vocab_size

    return cost_estimate(recipes, records, setting, store_vocab_size(records.workspace, setting))


def _finished(name: str, scale: str, results: Path, work: Path) -> "tuple[Record, Records]":
    """Return the record of a finished job or role ("student"), and all records."""
    from epochal.campaign.plan import named_roles

    setting, records = _load(scale, results, work, problems=False)
    record = records.named(name)
    if record is None:
        roles = named_roles(records, setting)
        if name not in roles:
            known = [*roles, *(record.job.name for record in records)]
            raise ValueError(
                f"{records.workspace.records} has no record {name!r}{nearest(name, known)}; see epochal plan --jobs."
            )
        record = roles[name]
    return record, records


def _intact(name: str, scale: str, results: Path, work: Path) -> "tuple[Record, Records]":
    """As `_finished`, after checking the files of its models against their checksums."""
    from epochal.campaign.integrity import refuse_damaged

    record, records = _finished(name, scale, results, work)
    refuse_damaged(record.job, records)
    return record, records


def _launch_module(name: str) -> Any:
    """Import a module of launch/, which is not part of the package `epochal`."""
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    return importlib.import_module(f"launch.{name}")


if __name__ == "__main__":
    main()
