"""The command line: `epochal data | plan | run | report | train | eval | generate | export | doctor`.

Exit codes: 0 done, 1 a job failed, 2 wrong use, 75 stopped early on purpose: run again to continue.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epochal.campaign.plan import Price, SearchState
    from epochal.campaign.worker import Orders
    from epochal.data.store import TokenStore
    from epochal.records import Record, Records, Workspace
    from epochal.report.sections import Section
    from epochal.scale import Hardware, Scale

app = typer.Typer(
    help="Pre-training recipes for finite text and unlimited compute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ScaleName = Annotated[str, typer.Option("--scale", help="A scale from configs/scales, or the path of one.")]
Results = Annotated[Path, typer.Option(help="Where records and reports lie; commit this folder.")]
Work = Annotated[Path, typer.Option(help="Where token stores, checkpoints and models lie.")]
Recipes = Annotated[list[str] | None, typer.Argument(help="Recipes; all of them when none is named.")]


def main() -> None:
    """Run the command line; a mistake of the user is one sentence and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"epochal: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        print(f"epochal: the package {error.name!r} is missing; run pip install {error.name}.", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"epochal: {where}{error.strerror or error}; make room or check the path, then run again.", file=sys.stderr
        )
        sys.exit(1)


@app.command()
def data(config: str, work: Work = Path("work")) -> None:
    """Turn text into a token store: CONFIG is a name from configs/data or a path."""
    from epochal.data.prepare import prepare

    store = prepare(config, work / "data")
    counts = ", ".join(f"{split} {count:,}" for split, count in store.meta["tokens"].items())
    dropped = ", ".join(f"{count} {what}" for what, count in store.meta["dropped"].items())
    print(f"{store.folder}: vocabulary {store.vocab_size:,}; tokens: {counts}; dropped: {dropped}")


@app.command()
def plan(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
    jobs: Annotated[bool, typer.Option("--jobs", help="List every job by name.")] = False,
    searches: Annotated[
        bool, typer.Option("--searches", help="List every search, also those finished or not begun.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show what runs, here or on a cluster, until all is done.")
    ] = False,
    every: Annotated[str, typer.Option(help="With --watch: how often to look.")] = "5s",
) -> None:
    """Show what is done, ready and waiting, with cost and disk; changes nothing."""
    from epochal.campaign.plan import outlook, recipe_names, store_vocab_size
    from epochal.config import seconds
    from epochal.records import load_records
    from epochal.scale import load_scale

    setting = load_scale(scale)
    workspace = _workspace(setting.name, results, work)
    if watch:
        _launch("watch").watch(recipes or recipe_names(), workspace, setting, every=seconds(every))
        return
    records = load_records(workspace)
    _say_problems(records.problems)
    view = outlook(recipes or recipe_names(), records, setting, store_vocab_size(workspace, setting))
    state, hardware = view.split, setting.hardware
    print(f"{setting.name}: {len(state.done)} done, {len(state.ready)} ready, {len(state.waiting)} waiting")
    for what, cost in (("known today", view.today), ("to come, if every search ends where it stands", view.later)):
        price = f"{cost.flops:.2e} FLOPs, about {_hours(cost, hardware)}"
        print(f"  {what}: {cost.jobs} jobs, {price}, {cost.disk / 1e9:,.2f} GB of models")
    for line in _search_lines(view.searches, hardware, every=searches):
        print(line)
    if jobs:
        for job in state.ready:
            print(f"  ready    {job.name}")
        for name, sources in state.waiting.items():
            print(f"  waiting  {name}  for {', '.join(sources)}")


@app.command()
def run(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    jobs: Annotated[
        int, typer.Option(min=1, help="Workers on this machine, each with its share of cores or one GPU.")
    ] = 1,
    profile: Annotated[
        str | None, typer.Option(help="An accelerate profile (configs/accelerate) for every run.")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences a process takes at once.")] = None,
    tracker: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio, wandb or none. Default: tensorboard if installed.")
    ] = None,
    time_limit: Annotated[str | None, typer.Option(help="Stop in good order after this long, e.g. 9m, 2h.")] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Longest time between two checkpoints.")] = "5m",
    cluster: Annotated[
        str | None, typer.Option(help="Run there instead: a cluster from configs/cluster, or the path of one.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --cluster: print the sbatch files only.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="With --cluster: take the campaign back.")] = False,
    export: Annotated[str | None, typer.Option(help="With --cluster: print it for skypilot or kubernetes.")] = None,
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
) -> None:
    """Run what the recipes still need. Start it twice and both share the work; stop it and it continues."""
    import os
    import uuid

    from rich.console import Console

    from epochal.campaign.display import Display
    from epochal.campaign.executor import run_campaign
    from epochal.campaign.plan import outlook, recipe_names, store_vocab_size
    from epochal.campaign.worker import Orders
    from epochal.config import find_config, seconds
    from epochal.data.store import open_store
    from epochal.records import load_records
    from epochal.scale import load_scale

    setting = load_scale(scale)
    workspace = _workspace(setting.name, results, work)
    _check_fit(setting, open_store(setting.data, workspace), micro_batch)
    records = load_records(workspace)
    _say_problems(records.problems)
    names = tuple(recipes or recipe_names())
    if "continued" in names and setting.continued is not None:
        open_store(setting.continued.data, workspace)
    view = outlook(names, records, setting, store_vocab_size(workspace, setting))
    orders = Orders(
        session=uuid.uuid4().hex,
        scale=scale,
        recipes=names,
        results=str(results),
        work=str(work),
        threads=max(1, len(os.sched_getaffinity(0)) // jobs),
        profile=None if profile is None else str(find_config("accelerate", profile, ".yaml")),
        micro_batch=micro_batch,
        trackers=_trackers(tracker),
        checkpoint_seconds=seconds(checkpoint_every),
        seconds_left=None if time_limit is None else seconds(time_limit),
    )
    if cluster is not None:
        if jobs != 1 or time_limit is not None:
            raise ValueError(
                "--jobs and --time-limit are for this machine; set pack, parallel and time_limit in the cluster file."
            )
        _run_there(orders, cluster, dry_run=dry_run, stop=stop, export=export)
        return
    if dry_run or stop or export:
        raise ValueError("--dry-run, --stop and --export need --cluster NAME.")
    to_do = view.today.flops + view.later.flops
    with Display(Console(), workspace, done=len(view.split.done), flops_to_do=to_do) as display:
        code = run_campaign(orders, jobs=jobs, progress=display)
    if code == 75:
        print("stopped on purpose; run the same command again to continue.")
    raise typer.Exit(code)


@app.command()
def report(
    recipes: Recipes = None,
    scale: ScaleName = "demo",
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
    records: Annotated[
        Path | None, typer.Option(help="A CSV instead: recipe, loss, and any of N_params, D_tokens, K.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="With --records: the recipe that others are compared with. Default: the first.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with another scale, or with the results folder of one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the report goes. Default: beside the records or the CSV.")
    ] = None,
) -> None:
    """Turn records into report.md, report.html, claims.json and figures; needs no torch."""
    from rich.console import Console

    from epochal.report.compare import Campaign, compare_campaigns
    from epochal.report.sections import print_summary
    from epochal.report.write import write_report

    if records is not None:
        sections, summary = _point_report(records, reference)
        title, folder = f"epochal: {records.name}", out or records.with_name(f"{records.stem}-report")
    else:
        setting, found, sections, summary = _campaign_report(recipes, scale, results, work)
        title, folder = f"epochal: {setting.name}", out or results / setting.name
        if against is not None:
            other_results, other_scale = _campaign_folder(against, results)
            other, theirs, their_sections, _ = _campaign_report(recipes, other_scale, other_results, work)
            same = other.name == setting.name
            names = (f"{setting.name} here", f"{other.name} there") if same else (setting.name, other.name)
            sections = compare_campaigns(
                Campaign(names[0], setting.data, found, sections),
                Campaign(names[1], other.data, theirs, their_sections),
            )
            title, folder = f"epochal: {names[0]} against {names[1]}", out or folder / f"against-{other.name}"
            counts = f"{len(found)} records of {names[0]}, {len(theirs)} of {names[1]}"
            summary = [f"{counts} (from {other_results / other.name}). Losses are nats per token; intervals are 90%."]
    path = write_report(sections, folder, title=title, summary=summary, scale=scale if records is None else "")
    print_summary(sections, Console())
    print(f"report: {path}")


def _point_report(path: Path, reference: str | None) -> "tuple[list[Section], list[str]]":
    from epochal.report.points import point_sections, read_points

    points, problems = read_points(path)
    _say_problems(problems)
    left_out = f" {len(problems)} rows were left out." * bool(problems)
    return point_sections(points, reference=reference), [f"{len(points)} points.{left_out} Intervals are 90%."]


def _campaign_report(
    recipes: list[str] | None, scale: str, results: Path, work: Path
) -> "tuple[Scale, Records, list[Section], list[str]]":
    """Return a campaign's scale, records, sections and the lines that open its report."""
    from dataclasses import replace

    from epochal.campaign.plan import load_recipe, recipe_names
    from epochal.records import load_records
    from epochal.scale import load_scale

    setting = load_scale(scale)
    records = load_records(_workspace(setting.name, results, work))
    _say_problems(records.problems)
    if not len(records):
        raise ValueError(f"{records.workspace.records} holds no records; run epochal run --scale {scale} first.")
    sections = [
        replace(load_recipe(name).report(records, setting), command=f"epochal run {name} --scale {scale}")
        for name in recipes or recipe_names()
    ]
    budgets = ", ".join(f"{tokens:,}" for tokens in setting.unique_tokens)
    left_out = f" {len(records.problems)} malformed ones were left out." * bool(records.problems)
    summary = [
        f"Data: {setting.data}; unique training tokens D: {budgets}; sequences of {setting.sequence_length} tokens.",
        f"{len(records)} records.{left_out} Losses are nats per token on the validation split; intervals are 90%.",
    ]
    return setting, records, sections, summary


def _campaign_folder(name: str, results: Path) -> tuple[Path, str]:
    """Return results folder and scale of what `--against` names: a scale, or a folder that holds its records."""
    folder = Path(name)
    return (folder.parent, folder.name) if (folder / "records").is_dir() else (results, name)


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="The run.json of a run, or the name of a run with a record or in a plan.")],
    scale: ScaleName = "demo",
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
) -> None:
    """Train one run: what `accelerate launch` starts on every process."""
    import json
    import logging

    from epochal.campaign.integrity import seal
    from epochal.campaign.worker import STOP_NOTE, Orders, execute, write_error_file
    from epochal.config import from_table
    from epochal.records import write_record
    from epochal.run import Run
    from epochal.stopping import EXIT_STOPPED, Stopped, listen

    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if run.endswith(".json"):
        path = Path(run)
        if not path.is_file():
            raise ValueError(f"{run} does not exist; give the run.json of a run.")
        table = json.loads(path.read_text(encoding="utf-8"))
        job: Any = from_table(table["run"], Run, where=f"{run}: run")
        orders = from_table(table["orders"], Orders, where=f"{run}: orders")
    else:
        job = _find_job(run, scale, results, work)
        orders = Orders(session="", scale=scale, recipes=(), results=str(results), work=str(work), threads=1)
    folder = orders.workspace.folder(job.name)
    launched = run.endswith(".json")
    listen(stop_file=folder / STOP_NOTE if launched else None)
    try:
        record = execute(job, orders)
    except Stopped as stop:
        print(f"epochal: {stop}; run again to continue.", file=sys.stderr)
        _leave(EXIT_STOPPED)
    except ValueError as error:
        print(f"epochal: {error}", file=sys.stderr)
        if launched:
            write_error_file(folder, error)
        _leave(2)
    except Exception as error:
        if launched:
            write_error_file(folder, error)
        raise
    else:
        if record is not None:
            seal(orders.workspace, job)
            print(f"{write_record(orders.workspace, record)}: {record.status}, loss {record.loss:.4f}")
        _leave(0)


@app.command(name="eval")
def evaluate(
    name: Annotated[str, typer.Argument(help="A finished run or ensemble, or with --tasks an exported folder.")],
    scale: ScaleName = "demo",
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, e.g. arc_easy,piqa,sciq; without a network cloze,next_passage.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="A folder with lm-eval task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first questions of each task.")] = None,
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
) -> None:
    """Compute validation and test loss from the weights, or with --tasks the zero-shot accuracy on lm-eval's tasks."""
    if tasks is not None:
        _score(name, tasks.split(","), scale, results, work, task_folder, limit)
        return
    from dataclasses import replace

    from epochal.evaluation.ensembles import evaluate_ensemble
    from epochal.records import load_records
    from epochal.run import Ensemble, Run

    workspace, record = _finished(name, scale, results, work)
    job = record.job
    if isinstance(job, Run):
        job = Ensemble(name=name, runs=(name,), average="probs")
    if not isinstance(job, Ensemble):
        raise ValueError(f"{name!r} is no model; name a run or an ensemble.")
    found = evaluate_ensemble(replace(job, tasks=()), workspace, load_records(workspace)).results
    losses = {"validation": found["loss"], "test": found.get("test_loss", math.nan)}
    for split, loss in losses.items():
        print(
            f"{split}: {loss:.6f} nats per token (record: {record.loss:.6f})"
            if split == "validation"
            else f"{split}: {loss:.6f}"
        )


@app.command()
def generate(
    name: str,
    scale: ScaleName = "demo",
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: int = 0,
    temperature: float = 1.0,
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
) -> None:
    """Print text sampled from a finished run or ensemble, which speaks as one model."""
    from epochal.generation.sample import sample_texts
    from epochal.records import load_records
    from epochal.run import Samples

    workspace, _ = _finished(name, scale, results, work)
    samples = Samples(
        name="text",
        source=name,
        tokens=tokens,
        max_length=max(2, tokens),
        seed=seed,
        temperature=temperature,
        draw="average",
    )
    if prompt is not None:
        from epochal.evaluation.downstream import continue_text

        print(continue_text(prompt, samples, workspace, load_records(workspace)))
        return
    for text in sample_texts(samples, workspace, load_records(workspace)):
        print(text)


@app.command()
def export(
    name: str,
    folder: Path,
    scale: ScaleName = "demo",
    gguf: Annotated[bool, typer.Option("--gguf", help="Also write model.gguf, for llama.cpp.")] = False,
    results: Results = Path("recipes/results"),
    work: Work = Path("work"),
) -> None:
    """Write a finished run or ensemble to FOLDER: a Hugging Face model with its card and record."""
    from epochal.export.huggingface import export as write
    from epochal.records import load_records

    workspace, _ = _finished(name, scale, results, work)
    write(name, folder, workspace, load_records(workspace), gguf=gguf)
    print(f"{folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it")


@app.command()
def doctor() -> None:
    """Say what is installed, what works, and which profile suits this machine."""
    from epochal.doctor import examine

    raise typer.Exit(examine())


def _score(
    name: str, tasks: list[str], scale: str, results: Path, work: Path, task_folder: Path | None, limit: int | None
) -> None:
    """Print the accuracy on each task and, as the paper does, their mean."""
    from transformers.utils import logging

    from epochal.evaluation.downstream import open_model, score
    from epochal.records import load_records
    from epochal.scale import load_scale

    logging.disable_progress_bar()
    if (Path(name) / "config.json").is_file():
        workspace = _workspace(load_scale(scale).name, results, work)
    else:
        workspace, _ = _finished(name, scale, results, work)
    model, tokenizer, store = open_model(name, workspace, load_records(workspace))
    found = score(model, tokenizer, tasks, store=store, task_folder=task_folder, limit=limit)
    for task, accuracy in found.items():
        print(f"{task}: {accuracy.value:.2%} +- {accuracy.error:.2%} ({accuracy.questions} questions)")
    if len(found) > 1:
        print(f"mean: {sum(accuracy.value for accuracy in found.values()) / len(found):.2%}")


def _leave(code: int) -> None:
    """End this process; one of several at once, without tearing anything down.

    The destructor of a gloo group joins threads that may wait for the interpreter this thread holds: it can hang.
    """
    import os

    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def _hours(cost: "Price", hardware: "Hardware") -> str:
    """Return hours of the scale's hardware; device-hours too where it is several devices."""
    each = f" ({cost.hours * hardware.devices:,.1f} device-hours)" if hardware.devices > 1 else ""
    shown = f"{cost.hours:,.2f} hours" if cost.hours >= 0.05 else f"{60 * cost.hours:.1f} minutes"
    return f"{shown} of {hardware.device}{each}"


def _search_lines(searches: "Sequence[SearchState]", hardware: "Hardware", *, every: bool) -> list[str]:
    """Say where each search under way stands, what its next round costs and what it can gain."""
    if not searches:
        return []
    finished, fresh = sum(search.certified for search in searches), sum(not search.begun for search in searches)
    hint = "" if every or not finished + fresh else " (--searches lists all)"
    lines = [f"  searches: {finished} of {len(searches)} with a certificate, {fresh} not begun{hint}"]
    shown = [search for search in searches if every or (search.begun and not search.certified)]
    width = max((len(search.what) for search in shown), default=0)
    for search in shown:
        cost, finer = search.next_round, ""
        gain = "nothing bounds its gain yet" if search.gain is None else f"to gain {search.gain:.4f} nats at most"
        jobs = f"{cost.jobs} job{'s' * (cost.jobs > 1)}"
        round_ = f"; next {jobs}, {_hours(cost, hardware)}, {gain}" if cost.jobs else ""
        if search.certified and search.finer is not None:
            finer = f"; a finer grid could gain {search.finer:.4f} nats"
        lines.append(f"    {search.what:{width}}  {search.state}{round_}{finer}")
    return lines


def _workspace(scale: str, results: Path, work: Path) -> "Workspace":
    from epochal.records import Workspace

    return Workspace(scale, results, work)


def _check_fit(setting: "Scale", store: "TokenStore", micro_batch: int | None) -> None:
    """Refuse a campaign that its text or its batch cannot carry before any worker starts."""
    from epochal.scale import Point

    for tokens in setting.budgets:
        point = Point(lr=setting.grid.lr[0], epochs=1, wd=0.0)
        store.training_stream(setting.run(setting.ladder[0].model, tokens, point))
    store.sequences("validation", setting.sequence_length)
    if micro_batch is not None and setting.batch_size % micro_batch:
        raise ValueError(f"micro-batch {micro_batch} does not divide batch_size {setting.batch_size}; use a divisor.")


def _finished(name: str, scale: str, results: Path, work: Path) -> "tuple[Workspace, Record]":
    """Return the workspace and the record of a finished job; raises ValueError with the nearest name."""
    from epochal.config import nearest
    from epochal.records import load_records
    from epochal.scale import load_scale

    workspace = _workspace(load_scale(scale).name, results, work)
    records = load_records(workspace)
    record = records.named(name)
    if record is None:
        known = [record.job.name for record in records]
        raise ValueError(f"{workspace.records} has no record {name!r}{nearest(name, known)}; see epochal plan --jobs.")
    return workspace, record


def _find_job(name: str, scale: str, results: Path, work: Path) -> Any:
    """Return a job by its name, from its record or from today's plan of all recipes."""
    from epochal.campaign.plan import campaign_jobs, recipe_names
    from epochal.config import nearest
    from epochal.records import load_records
    from epochal.scale import load_scale

    setting = load_scale(scale)
    records = load_records(_workspace(setting.name, results, work))
    record = records.named(name)
    if record is not None:
        return record.job
    jobs = {job.name: job for job in campaign_jobs(recipe_names(), records, setting)}
    if name not in jobs:
        raise ValueError(f"scale {setting.name!r} plans no job {name!r}{nearest(name, jobs)}; see epochal plan --jobs.")
    return jobs[name]


def _say_problems(problems: tuple[str, ...]) -> None:
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        print(f"{len(problems)} malformed records were left out.", file=sys.stderr)


def _launch(part: str) -> Any:
    """Import a part of launch/, which lies beside the package as the recipes do."""
    import importlib

    from epochal.config import REPOSITORY

    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    return importlib.import_module(f"launch.{part}")


def _run_there(orders: "Orders", name: str, *, dry_run: bool, stop: bool, export: str | None) -> None:
    """Hand a campaign to a cluster, or print what would be handed over."""
    from epochal.campaign.cluster import load_cluster, submission
    from epochal.campaign.plan import campaign_jobs
    from epochal.records import load_records, needed
    from epochal.scale import load_scale

    campaign = submission(orders, load_cluster(name))
    if export is not None:
        print(_launch("exports").export(campaign, export), end="")
    elif dry_run:
        records = load_records(campaign.orders.workspace)
        ready = needed(campaign_jobs(orders.recipes, records, load_scale(orders.scale)), records)
        print("\n".join(_launch("submit").preview(campaign, ready)), end="")
    else:
        submit = _launch("submit")
        print(submit.stop(campaign) if stop else submit.submit(campaign))


def _trackers(chosen: list[str] | None) -> tuple[str, ...]:
    """Return the trackers for accelerate: the named ones, or TensorBoard where it is installed."""
    import importlib.util

    known = ("tensorboard", "trackio", "wandb")
    if chosen is None:
        return ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    names = tuple(name for name in chosen if name != "none")
    for name in names:
        if name not in known:
            raise ValueError(f"tracker {name!r} is unknown; choose from {', '.join(known)}, none.")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracker {name!r} is not installed; run pip install {name}.")
    return names


if __name__ == "__main__":
    main()
