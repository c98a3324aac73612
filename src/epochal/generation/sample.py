"""Text sampled from finished models: what a student learns from (spec section 9).

Unconditional, at a given temperature, in batches with a key-value cache. A text may be longer than the models' context:
when the context is full, generation goes on from its second half, the way a sliding window reads.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from epochal.data.store import Tokens, TokenStore, open_store
from epochal.models.load import load_model, member_records
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, input_fingerprints
from epochal.run import Ensemble, Run, Samples, fingerprint
from epochal.stopping import check_stop

BATCH = 256
"""Most texts sampled side by side; fewer where fewer of full length give the tokens that are wanted."""


def sample(samples: Samples, workspace: Workspace, records: Records) -> Record:
    """Draw the tokens of a Samples job, from members one by one or from their average, and write `samples.npy`.

    The file holds one flat row of tokens, every text from its start token to its end token (or `max_length`).
    Raises ValueError when a source has no finished model.
    """
    members = member_records(samples.source, records)
    store, texts = _draw_all(samples, members, workspace, records)
    bos = int(store.meta["bos"])
    tokens = np.concatenate(texts).astype(store.meta["dtype"])
    path = workspace.folder(samples.name) / "samples.npy"
    _write(path, tokens)
    texts_drawn = int((tokens == bos).sum())
    return Record(
        job=samples,
        fingerprint=fingerprint(samples),
        status="done",
        results={"tokens": len(tokens), "texts": texts_drawn, "members": len(members)},
        inputs=_marks(samples, members, records),
        provenance=provenance(),
    )


def sample_texts(samples: Samples, workspace: Workspace, records: Records) -> list[str]:
    """Draw texts as `sample` does and return them as strings; writes nothing."""
    from tokenizers import Tokenizer

    store, texts = _draw_all(samples, member_records(samples.source, records), workspace, records)
    tokenizer = Tokenizer.from_file(str(store.tokenizer_folder / "tokenizer.json"))
    return [str(tokenizer.decode(text.tolist())) for text in texts]


def _draw_all(
    samples: Samples, members: list[Record], workspace: Workspace, records: Records
) -> tuple[TokenStore, list[Tokens]]:
    """Return the members' token store and the texts, each voice its part of the tokens."""
    run = members[0].job
    assert isinstance(run, Run)
    store = open_store(run.data, workspace)
    bos, eos = int(store.meta["bos"]), int(store.meta["eos"])
    drawn: list[Tokens] = []
    voices = _voices(samples, members, workspace, records)
    ends = _ends(samples, len(voices), records)
    for index, (load, begin, end) in enumerate(zip(voices, [0, *ends], ends, strict=False)):
        share = end - begin
        if not share:
            continue
        model = load()
        generator = torch.Generator().manual_seed(samples.seed * 1009 + index)
        rows = min(BATCH, math.ceil(share / samples.max_length))
        texts = draw(model, samples, rows, context=run.sequence_length, bos=bos, eos=eos, generator=generator)
        drawn += _take(texts, share)
    return store, drawn


def _ends(samples: Samples, voices: int, records: Records) -> list[int]:
    """Return where the part of each voice ends, in tokens: parts in proportion to the weights of the members."""
    weights = _weights(samples, records)
    if voices == 1 or weights is None:
        return [samples.tokens * (index + 1) // voices for index in range(voices)]
    return [math.floor(samples.tokens * total + 1e-6) for total in itertools.accumulate(weights)]


def _weights(samples: Samples, records: Records) -> tuple[float, ...] | None:
    """Return the weights that the source gives its members; None where it gives none."""
    source = records.named(samples.source)
    return source.job.member_weights if source is not None and isinstance(source.job, Ensemble) else None


def _marks(samples: Samples, members: list[Record], records: Records) -> dict[str, str]:
    """Return the fingerprints of what was read.

    Members one by one do not depend on how their ensemble averages, only on the weights that it may give them.
    """
    if samples.draw == "average" or _weights(samples, records) is not None:
        return input_fingerprints(samples, records)
    return {member.job.name: member.fingerprint for member in members}


def _voices(samples: Samples, members: list[Record], workspace: Workspace, records: Records) -> list[Callable[[], Any]]:
    """Return how to load each model that speaks: the members one by one, or all of them as one."""
    source = records.named(samples.source)
    if samples.draw == "members" or source is None or not isinstance(source.job, Ensemble):
        return [functools.partial(load_model, workspace, member.job.name) for member in members]
    from epochal.models.load import load_source

    return [functools.partial(load_source, samples.source, workspace, records)]


def draw(
    model: Any, samples: Samples, batch: int, *, context: int, bos: int, eos: int, generator: torch.Generator
) -> Iterator[Tokens]:
    """Yield sampled texts without end, `batch` at a time, each from `bos` to `eos` or to `max_length` tokens."""
    while True:
        rows = torch.full((batch, 1), bos, dtype=torch.long)
        while len(rows) and rows.shape[1] < samples.max_length:
            rows = _extend(model, rows, samples, context=context, generator=generator)
            ended = (rows == eos).any(dim=1) | (rows.shape[1] >= samples.max_length)
            for row in rows[ended].numpy():
                ends = np.flatnonzero(row == eos)
                yield row[: ends[0] + 1] if len(ends) else row
            rows = rows[~ended]


@torch.no_grad()
def _extend(
    model: Any, rows: torch.Tensor, samples: Samples, *, context: int, generator: torch.Generator
) -> torch.Tensor:
    """Append up to half a context of tokens to each row (b, t), reading at most half a context before them."""
    half = max(1, context // 2)
    window = rows[:, -half:]
    count = min(context - window.shape[1], samples.max_length - rows.shape[1])
    new, cache = window, None
    drawn = []
    for _ in range(count):
        check_stop()
        output = model(input_ids=new.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].float().cpu() / samples.temperature, dim=-1)
        new = torch.multinomial(probabilities, 1, generator=generator)
        drawn.append(new)
    return torch.cat([rows, *drawn], dim=1)


def _take(texts: Iterator[Tokens], tokens: int) -> list[Tokens]:
    """Take whole texts until there are `tokens` tokens, the last one cut."""
    taken: list[Tokens] = []
    while tokens > 0:
        taken.append(next(texts)[:tokens])
        tokens -= len(taken[-1])
    return taken


def _write(path: Path, tokens: Tokens) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(".samples.tmp.npy")
    np.save(beside, tokens)
    beside.replace(path)
