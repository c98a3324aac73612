"""A real Slurm of two nodes on this one machine: munged, slurmctld and two slurmd in a temporary folder.

Needs root and the programs of Debian's `slurm-wlm` and `munge`; it uses no system service or file.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CORES = 4
"""Cores that each node claims to have: more than exist, so that small jobs share this machine."""

# A requeued job waits until its old credential expires, 120 seconds by default: `cred_expire` shortens that.
CONFIG = """
ClusterName=epochal
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,defer_batch
JobRequeue=1
SlurmdParameters=config_overrides
KillWait=10
MinJobAge=300
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return the reason why Slurm cannot run on this machine, or None."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"{lacking[0]} is not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "a private Slurm needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _die_with_parent() -> None:
    """Make the kernel kill a daemon when its parent ends (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Slurm:
    """A running cluster with the nodes n1 and n2; `environment` is what its commands need. Call `stop` at the end."""

    nodes = ("n1", "n2")

    def __init__(self, *, slurmd_timeout: int = 30) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="epochal-slurm-"))
        self.folder.chmod(0o755)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={CORES} "
            f"CoresPerSocket={CORES} RealMemory=1000 State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        self.config = self.folder / "slurm.conf"
        self.config.write_text(
            CONFIG.format(
                host=socket.gethostname(),
                folder=self.folder,
                controller_port=ports[0],
                nodes="\n".join(lines),
                slurmd_timeout=slurmd_timeout,
            )
        )
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _path()}
        try:
            self._start_munge()
            self._start("slurmctld", "-i", "-D")
            for name in self.nodes:
                self.start_node(name)
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        options = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munge.pid",
            "log-file": self.folder / "munge.log",
            "seed-file": self.folder / "munge.seed",
        }
        self._start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items()))
        deadline = time.monotonic() + 20
        while not (self.folder / "munge.socket").exists():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def _start(self, name: str, *arguments: str, label: str | None = None) -> None:
        program = shutil.which(name, path=_path())
        assert program is not None
        with (self.folder / f"{label or name}.out").open("ab") as output:
            self.daemons[label or name] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start("slurmd", "-D", "-N", name, label=name)

    def stop_node(self, name: str) -> None:
        """Stop the slurmd of a node; its jobs continue, as on a real cluster."""
        daemon = self.daemons.pop(name)
        daemon.terminate()
        daemon.wait(20)

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            states = self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()
            if states == ["idle"] * len(self.nodes):
                return
            assert time.monotonic() < deadline, f"{states}\n{self.logs()}"
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a Slurm command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done

    def logs(self) -> str:
        """The last lines of every daemon."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:]) for path in files)

    def stop(self) -> None:
        """Cancel every job, end the daemons (and what they started), remove the folder."""
        if "slurmctld" in self.daemons:
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(list(self.daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
