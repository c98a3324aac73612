"""Measure how fast this machine trains models: tokens per second of one worker."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch

from epochal.loss import cross_entropy
from epochal.models.llama import build_model, next_token
from epochal.optim.roles import head_weight

# Steps are timed until both are reached; the first step is not counted.
SECONDS, STEPS = 0.4, 4


def training_speeds(
    models: Iterable[str], *, vocab_size: int, sequence_length: int, sequences: int, threads: int, device: str = "cpu"
) -> dict[str, float]:
    """Return tokens per second by model of one worker with `threads` CPU threads.

    Forward, backward and an AdamW step on batches of `sequences` x `sequence_length` random tokens.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {model: _steps(model, vocab_size, sequence_length, sequences, torch.device(device)) for model in models}
    finally:
        torch.set_num_threads(before)
    return {model: sequences * sequence_length / seconds for model, seconds in steady(steps).items()}


def steady(steps: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return seconds per step by model that compare on a busy machine.

    `steps` are seconds of single steps, of which other programs slow down some. Each model has its fastest step, times what
    all steps took over what they would have taken as the fastest ones.
    """
    ideal = sum(len(seconds) * min(seconds) for seconds in steps.values())
    slower = sum(map(sum, steps.values())) / ideal
    return {model: min(seconds) * slower for model, seconds in steps.items()}


def _steps(name: str, vocab_size: int, sequence_length: int, sequences: int, device: torch.device) -> list[float]:
    """Return the seconds of each step but the first."""
    model = build_model(name, vocab_size=vocab_size, max_positions=sequence_length, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(vocab_size, (sequences, sequence_length), device=device)
    found: list[float] = []
    while len(found) <= STEPS or sum(found[1:]) < SECONDS:
        started = time.perf_counter()
        # bf16 where the campaign would use it.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden, targets = next_token(model, tokens)
            loss = cross_entropy(hidden, head_weight(model), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        found.append(time.perf_counter() - started)
    return found[1:]
