"""Groups of gloo processes that run a function on every rank.

    with group(4) as processes: results = processes.run("module:function", argument)

A group is started once and serves many calls, since starting it takes seconds. A call that fails in any process, or does
not return, fails the test with that process's error.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

SECONDS = 240
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
IMPORTED = [
    "epochal.training.loop",
    "deepspeed",
    "torch._inductor.compile_fx",
    "transformers.models.llama.modeling_llama",
]
"""Imported once, by a server from which all processes are forked: it takes seconds."""


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **ENVIRONMENT,
    }
    torch.set_num_threads(1)
    silent = os.open(
        os.devnull, os.O_WRONLY
    )  # DeepSpeed warns of every optimizer but its own; errors go through the pipe
    for stream in (1, 2):
        os.dup2(silent, stream)
    while True:
        call = pipe.recv()
        if call is None:
            os._exit(0)  # gloo's destructors may hang
        name, arguments = call
        try:
            module, function = name.split(":")
            result = getattr(importlib.import_module(module), function)(*arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def start_server() -> Any:
    """Start the server that processes are forked from, unless it runs; it imports in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


class Group:
    """Processes that wait for calls."""

    def __init__(self, world: int) -> None:
        context = start_server()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        self.alive = True
        for rank in range(world):
            pipe, child_pipe = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, child_pipe), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, name: str, *arguments: Any) -> list[Any]:
        """Call a function in every process; returns the results in order of ranks."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        self.alive = False  # until all have answered: after a failure some may block in a collective
        results, deadline = [], time.monotonic() + SECONDS
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(max(0.0, deadline - time.monotonic())), f"process {rank} did not answer in {SECONDS} s"
            done, result = pipe.recv()
            assert done, f"process {rank}:\n{result}"
            results.append(result)
        self.alive = True
        return results

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if self.alive:
                pipe.send(None)
                process.join(5)
            process.kill()
            process.join()


@contextmanager
def group(world: int) -> Iterator[Group]:
    """Start a group of processes, and end it in any case."""
    processes = Group(world)
    try:
        yield processes
    finally:
        processes.close()
