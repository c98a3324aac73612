"""The same cluster file for schedulers that start containers: a SkyPilot task and a Kubernetes indexed Job.

There is no planner: each worker plans for itself, as on a laptop, in a volume that all of them share.
"""

import shlex
from pathlib import Path
from typing import Any

from epochal.campaign.cluster import Cloud, Submitted
from epochal.config import REPOSITORY, nearest, seconds
from epochal.stopping import EXIT_STOPPED

FIRST = "# Once before: epochal data on the shared volume, so that the token store is there.\n"


def export(campaign: Submitted, kind: str) -> str:
    """Return the YAML of a campaign; raises ValueError for what containers cannot do."""
    import yaml

    kinds = {"skypilot": skypilot, "kubernetes": kubernetes}
    if kind not in kinds:
        raise ValueError(f"export {kind!r} is unknown{nearest(kind, kinds)}; choose from {', '.join(kinds)}.")
    cluster = campaign.cluster
    if cluster.cloud is None:
        raise ValueError(f"cluster {cluster.name!r} has no [cloud] with an image and a volume; add it.")
    if cluster.nodes > 1:
        raise ValueError(
            f"cluster {cluster.name!r} gives each run {cluster.nodes} nodes; exports start one-node workers."
        )
    text: str = yaml.safe_dump(kinds[kind](campaign, cluster.cloud), sort_keys=False, width=110)
    return FIRST + text


def skypilot(campaign: Submitted, cloud: Cloud) -> dict[str, Any]:
    """A SkyPilot task (docs.skypilot.co, "Task YAML"): one worker on each of `parallel` nodes."""
    cluster = campaign.cluster
    resources: dict[str, Any] = {"accelerators": cloud.gpu} if cloud.gpu else {}
    resources |= {"cpus": f"{cloud.cpus}+", "memory": f"{cloud.memory}+", "image_id": f"docker:{cloud.image}"}
    return {
        "name": _name(campaign),
        "num_nodes": cluster.parallel,
        "resources": resources,
        "volumes": {cloud.mount: cloud.volume},
        "run": "\n".join(_shell(campaign, cloud)) + "\n",
    }


def kubernetes(campaign: Submitted, cloud: Cloud) -> dict[str, Any]:
    """A Kubernetes Job with one index per worker; a worker that was evicted or stopped in good order is started again."""
    cluster = campaign.cluster
    amounts: dict[str, Any] = {"cpu": str(cloud.cpus), "memory": f"{cloud.memory}Gi"}
    if cloud.gpus:
        amounts["nvidia.com/gpu"] = str(cloud.gpus)
    container = {
        "name": "worker",
        "image": cloud.image,
        "command": ["bash", "-c", "\n".join(_shell(campaign, cloud))],
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": [{"name": "shared", "mountPath": cloud.mount}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": round(seconds(cluster.grace)),
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": cloud.volume}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    stopped = {"containerName": "worker", "operator": "In", "values": [EXIT_STOPPED]}
    wrong_use = {"containerName": "worker", "operator": "In", "values": [2]}
    spec = {
        "completions": cluster.parallel,
        "parallelism": cluster.parallel,
        "completionMode": "Indexed",
        "backoffLimitPerIndex": cluster.retries,
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Ignore", "onExitCodes": stopped},
                {"action": "FailJob", "onExitCodes": wrong_use},
            ]
        },
        "template": {"spec": pod},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": _name(campaign)}, "spec": spec}


def _shell(campaign: Submitted, cloud: Cloud) -> list[str]:
    """What every worker runs: `epochal run` on the shared volume."""
    orders, pack = campaign.orders, campaign.cluster.pack
    jobs = pack if orders.profile else pack * max(1, cloud.gpus)
    words = ["epochal", "run", *orders.recipes, "--scale", _inside(orders.scale, cloud), "--jobs", str(jobs)]
    words += ["--results", f"{cloud.mount}/results", "--work", f"{cloud.mount}/work"]
    words += ["--profile", _inside(orders.profile, cloud)] if orders.profile else []
    words += ["--micro-batch", str(orders.micro_batch)] if orders.micro_batch else []
    words += [word for name in orders.trackers or ("none",) for word in ("--tracker", name)]
    return [f"cd {shlex.quote(cloud.folder)}", *campaign.cluster.setup, f"exec {shlex.join(words)}"]


def _inside(path: str, cloud: Cloud) -> str:
    """Return a file of this repository as the image sees it."""
    if not Path(path).is_relative_to(REPOSITORY):
        raise ValueError(f"{path} is not in the image; put it under {REPOSITORY / 'configs'} and name it.")
    return str(Path(cloud.folder) / Path(path).relative_to(REPOSITORY))


def _name(campaign: Submitted) -> str:
    """A name that both take: lower case, digits and dashes."""
    scale = "".join(letter if letter.isalnum() else "-" for letter in campaign.orders.workspace.scale.lower())
    return f"epochal-{scale}".rstrip("-")
