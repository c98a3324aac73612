"""32 workers on one folder and 1,000 trivial jobs: each job runs exactly once, and planning stays fast."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from campaigns import Campaign

WORKERS, JOBS = 32, 1000

WORKER = """
import json, os, sys, time
from dataclasses import replace
from epochal.campaign import worker
from epochal.records import Record
from epochal.run import fingerprint
from epochal.scale import load_scale
from epochal.scale import Point

folder, scale_path, count, workers = *sys.argv[1:3], *map(int, sys.argv[3:])
scale = load_scale(scale_path)
one = scale.run("w16", 2048, Point(lr=0.01, epochs=1, wd=0.1))
jobs = [replace(one, name=f"job-{number:04d}", init_seed=number) for number in range(count)]
planned = []

def plan(recipes, records, scale):
    planned.append(time.thread_time())
    return jobs

def emit(event):  # one write per line: lines of different workers do not mix
    log.write(json.dumps(event) + chr(10))
    log.flush()

def slowest():  # processor seconds from one plan to the next, including the trivial job between them
    return max((b - a for a, b in zip(planned, planned[1:])), default=0.0)

worker.campaign_jobs = plan
worker.execute = lambda job, config: Record(job, fingerprint(job), "done", {"loss": 1.0, "parameters": 1})
places = {"results": f"{folder}/results", "work": f"{folder}/work"}
config = worker.WorkerConfig(session="s", scale=scale_path, recipes=("none",), threads=1, **places)
children = []
while len(children) < workers:  # forked, so that all workers share the imports
    children.append(os.fork())
    if children[-1] == 0:
        log = open(f"{folder}/log", "a")
        code = worker.work(config, emit)
        emit({"event": "end", "slowest": slowest(), "plans": len(planned)})
        os._exit(code)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def test_every_job_runs_exactly_once(campaign: Campaign) -> None:
    command = [sys.executable, "-c", WORKER, str(campaign.folder), str(campaign.scale_path), str(JOBS), str(WORKERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in (campaign.folder / "log").read_text().splitlines()]
    for what in ("started", "done"):
        counts = Counter(event["name"] for event in events if event["event"] == what)
        assert len(counts) == JOBS and set(counts.values()) == {1}, what
    assert len(campaign.records) == JOBS and campaign.records.problems == ()
    ends = [event for event in events if event["event"] == "end"]
    assert len(ends) == WORKERS
    assert max(end["slowest"] for end in ends) < 2.0, "a round of planning took two seconds of processor time"
    assert not list(Path(campaign.workspace.records).glob(".*")), "a half-written record was left"
