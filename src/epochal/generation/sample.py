"""Sample text from finished models, as training data for students (spec section 9).

Unconditional or as continuations of training documents, at a given temperature, in batches with a key-value cache. When the
context is full, generation continues from its second half, so texts may be longer than the context.
"""

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from epochal.config import write_atomic
from epochal.data.store import Tokens, TokenStore, open_store
from epochal.meaning import take_folder
from epochal.models.load import Loader, load_model, load_source, member_records
from epochal.provenance import provenance
from epochal.records import Record, Records, Workspace, input_fingerprints
from epochal.run import Ensemble, Run, Samples, fingerprint
from epochal.stopping import check_stop

# Texts sampled in parallel; fewer if fewer texts of maximal length give enough tokens.
BATCH = 256


def sample(samples: Samples, workspace: Workspace, records: Records) -> Record:
    """Sample the tokens of a Samples job and write `samples.npy`.

    Texts come from each member or from their average. The file holds one flat array of tokens, each text from its start
    token to its end token (or `max_length` tokens). Raises ValueError if the source is not a finished model.
    """
    members, marks = member_records(samples.source, records), input_fingerprints(samples, records)
    take_folder(samples, workspace, records)
    store, texts = _draw_all(samples, members, workspace, records)
    bos = int(store.meta["bos"])
    tokens = np.concatenate(texts).astype(store.meta["dtype"])
    data = io.BytesIO()
    np.save(data, tokens)
    write_atomic(workspace.folder(samples.name) / "samples.npy", data.getvalue())
    return Record(
        job=samples,
        fingerprint=fingerprint(samples),
        status="done",
        results={
            "tokens": len(tokens),
            "texts": int((tokens == bos).sum()),
            "members": len(members),
            "vocabulary": store.vocabulary,
        },
        inputs=marks,
        provenance=provenance(),
    )


def sample_texts(samples: Samples, workspace: Workspace, records: Records) -> list[str]:
    """Sample as `sample` does and return the texts as strings, without writing a file."""
    store, texts = _draw_all(samples, member_records(samples.source, records), workspace, records)
    tokenizer = store.tokenizer()
    return [str(tokenizer.decode(text.tolist())) for text in texts]


def _draw_all(
    samples: Samples, members: list[Record], workspace: Workspace, records: Records
) -> tuple[TokenStore, list[Tokens]]:
    """Return the members' token store and the texts."""
    run = members[0].job
    assert isinstance(run, Run)
    store = open_store(run.data, workspace)
    bos, eos = int(store.meta["bos"]), int(store.meta["eos"])
    drawn: list[Tokens] = []
    loaders = _loaders(samples, members, workspace, records)
    ends = _ends(samples, len(loaders), records)
    for index, (load, begin, end) in enumerate(zip(loaders, [0, *ends], ends, strict=False)):
        share = end - begin
        if not share:
            continue
        model = load()
        # A generator per model, on the CPU: its random numbers depend neither on the device nor on the other models.
        generator = torch.Generator().manual_seed(samples.seed * 1009 + index)
        limits: dict[str, Any] = {"context": run.sequence_length, "eos": eos, "generator": generator}
        if samples.prompt_tokens:
            # Each model continues documents of its own.
            mine = prompts(store, run, samples.prompt_tokens)[index :: len(loaders)]
            drawn += _take(iter(continue_documents(model, samples, mine, share, **limits)), share)
        else:
            rows = min(BATCH, math.ceil(share / samples.max_length))
            drawn += _take(draw(model, samples, rows, bos=bos, **limits), share)
    return store, drawn


def prompts(store: TokenStore, run: Run, length: int) -> Tokens:
    """Return the first tokens of each document of a run's training text, (documents, length) int64.

    Shorter documents are left out. Raises ValueError if all are shorter.
    """
    stream = store.training_stream(run)
    ends = np.append(stream.starts[1:], len(stream.tokens))
    firsts = [stream.tokens[a : a + length] for a, b in zip(stream.starts, ends, strict=True) if b - a >= length]
    if not firsts:
        raise ValueError(
            f"no document of the text of {run.name!r} has {length} tokens to continue; use fewer prompt_tokens."
        )
    return np.stack(firsts).astype(np.int64)


def continue_documents(
    model: Any, samples: Samples, documents: Tokens, tokens: int, *, context: int, eos: int, generator: torch.Generator
) -> list[Tokens]:
    """Return texts that continue prompts (m, p), `samples.continuations` of each, at least `tokens` tokens.

    Documents come in order, again from the first where they are too few. Raises ValueError without any.
    """
    if not len(documents):
        raise ValueError(f"{samples.name!r} has more models than documents to continue; use a shorter prompt.")
    count, at_once = samples.continuations, max(1, BATCH // samples.continuations)
    groups, total, position = list[list[Tokens]](), 0, 0
    while total < tokens:
        picked = documents[np.arange(position, position + at_once) % len(documents)]
        texts = _continued(model, samples, np.repeat(picked, count, axis=0), context, eos, generator)
        groups += [texts[first : first + count] for first in range(0, len(texts), count)]
        position += at_once
        # As joined text, the shorter form, so that both forms are made of the same documents.
        total = sum(len(joined(group, eos)) for group in groups)
    if samples.joined:
        return [joined(group, eos) for group in groups]
    return [group[number] for number in range(count) for group in groups]


def joined(texts: Sequence[Tokens], eos: int) -> Tokens:
    """Return texts of one document as one: one start token, and an end token only where the last text has it."""
    parts = [
        text[:-1] if text[-1] == eos and number < len(texts) else text for number, text in enumerate(texts, start=1)
    ]
    return np.concatenate([parts[0], *(part[1:] for part in parts[1:])])


def _continued(
    model: Any, samples: Samples, begun: Tokens, context: int, eos: int, generator: torch.Generator
) -> list[Tokens]:
    """Return one text for each of (b, p) prompts, in order.

    A text ends with `eos` or at `max_length` tokens.
    """
    rows, waiting = torch.from_numpy(begun), np.arange(len(begun))
    texts: dict[int, Tokens] = {}
    while len(rows):
        rows = _extend(model, rows, samples, context=context, generator=generator)
        drawn = rows[:, begun.shape[1] :] == eos
        ended = drawn.any(dim=1) | (rows.shape[1] >= samples.max_length)
        for number, row in zip(waiting[ended.numpy()], rows[ended].numpy(), strict=True):
            ends = begun.shape[1] + np.flatnonzero(row[begun.shape[1] :] == eos)
            texts[int(number)] = row[: ends[0] + 1] if len(ends) else row
        rows, waiting = rows[~ended], waiting[~ended.numpy()]
    return [texts[number] for number in range(len(begun))]


def _ends(samples: Samples, models: int, records: Records) -> list[int]:
    """Return where the tokens of each model end; its share is its weight in the ensemble."""
    weights = _weights(samples, records)
    if models == 1 or weights is None:
        return [samples.tokens * (index + 1) // models for index in range(models)]
    # 1e-6: sums such as 0.6 + 0.3 + 0.1 may be just below a whole number of tokens
    return [math.floor(samples.tokens * total + 1e-6) for total in itertools.accumulate(weights)]


def _weights(samples: Samples, records: Records) -> tuple[float, ...] | None:
    source = records.named(samples.source)
    return source.job.member_weights if source is not None and isinstance(source.job, Ensemble) else None


def _loaders(samples: Samples, members: list[Record], workspace: Workspace, records: Records) -> list[Loader]:
    """Return loaders of the models to sample from: each member, or all members as one model."""
    source = records.named(samples.source)
    if samples.draw == "members" or source is None or not isinstance(source.job, Ensemble):
        return [partial(load_model, workspace, member.job.name) for member in members]
    return [partial(load_source, samples.source, workspace, records)]


def draw(
    model: Any, samples: Samples, batch: int, *, context: int, bos: int, eos: int, generator: torch.Generator
) -> Iterator[Tokens]:
    """Yield sampled texts without end, each from `bos` to `eos` or of `max_length` tokens.

    `batch` texts are sampled in parallel; those that end leave the batch after half a `context` of tokens.
    """
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
    """Append up to half a context of tokens to each row (b, t)."""
    # Given at most half a context before them, so that a text may be longer than the context.
    half = max(1, context // 2)
    window = rows[:, -half:]
    count = min(context - window.shape[1], samples.max_length - rows.shape[1])
    new, cache = window, None
    drawn = []
    for _ in range(count):
        check_stop()
        output = model(input_ids=new.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        # On the CPU, where the generator is.
        probabilities = torch.softmax(output.logits[:, -1].float().cpu() / samples.temperature, dim=-1)
        new = torch.multinomial(probabilities, 1, generator=generator)
        drawn.append(new)
    return torch.cat([rows, *drawn], dim=1)


def _take(texts: Iterator[Tokens], tokens: int) -> list[Tokens]:
    """Return texts with `tokens` tokens in total; the last one is cut."""
    taken: list[Tokens] = []
    while tokens > 0:
        taken.append(next(texts)[:tokens])
        tokens -= len(taken[-1])
    return taken
