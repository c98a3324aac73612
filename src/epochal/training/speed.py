"""Measure how fast this machine trains models: tokens per second of one worker."""

import time
from collections.abc import Iterable

import torch

from epochal.loss import cross_entropy
from epochal.models.llama import build_model, next_token
from epochal.optim.roles import head_weight

# Steps are timed until both are reached; the first step is not counted.
SECONDS, STEPS = 0.4, 2


def training_speeds(
    models: Iterable[str], *, vocab_size: int, sequence_length: int, sequences: int, threads: int, device: str = "cpu"
) -> dict[str, float]:
    """Return tokens per second by model of one worker with `threads` CPU threads.

    Forward, backward and an AdamW step on batches of `sequences` x `sequence_length` random tokens.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {model: _speed(model, vocab_size, sequence_length, sequences, torch.device(device)) for model in models}
    finally:
        torch.set_num_threads(before)


def _speed(name: str, vocab_size: int, sequence_length: int, sequences: int, device: torch.device) -> float:
    model = build_model(name, vocab_size=vocab_size, max_positions=sequence_length, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(vocab_size, (sequences, sequence_length), device=device)
    started, steps = 0.0, -1
    while steps < STEPS or time.perf_counter() - started < SECONDS:
        if steps == 0:
            started = time.perf_counter()
        # bf16 where the campaign would use it.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden, targets = next_token(model, tokens)
            loss = cross_entropy(hidden, head_weight(model), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        steps += 1
    return steps * tokens.numel() / (time.perf_counter() - started)
