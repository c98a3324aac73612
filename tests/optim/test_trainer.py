"""Fira and SPECTRA in a plain torch loop and in transformers' Trainer with its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from epochal.optim import Fira, Spectra, fira_param_groups

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "fira": lambda model: Fira(fira_param_groups(model, rank=4, update_proj_gap=4, alpha=0.25), lr=1e-2),
    "spectra": lambda model: Spectra(model.parameters(), lr=1e-2, clip=2.0, weight_decay=0.1, warmup_steps=2),
    "spectra-named": lambda model: Spectra(
        model.named_parameters(), lr=1e-2, base="signum", clip=2.0, apply_to=["mlp"]
    ),
}
every = pytest.mark.parametrize("name", OPTIMIZERS)


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Rows of a fixed pattern: easy to learn."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = (torch.arange(12) * (1 + index % 3)) % 32
        return {"input_ids": row, "labels": row}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


@every
def test_a_plain_loop_learns(name: str) -> None:
    model = tiny_model()
    optimizer = OPTIMIZERS[name](model)
    rows = torch.stack([Sentences()[i]["input_ids"] for i in range(8)])
    losses = []
    for _ in range(25):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def trainer(folder: Path, make: Make, steps: int) -> Trainer:
    model = tiny_model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        lr_scheduler_type="constant",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), optimizers=(make(model), None))


@every
def test_the_trainer_learns_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    def run(folder: Path, steps: int, **options: Any) -> Trainer:
        subject = trainer(folder, OPTIMIZERS[name], steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own notices
            subject.train(**options)
        return subject

    whole = run(tmp_path / "whole", 10)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.3
    run(tmp_path / "cut", 5)
    resumed = run(tmp_path / "cut", 10, resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
