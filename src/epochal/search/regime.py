"""Choose a campaign for a text and a time: vocabulary, batch, model, epochs, members.

The rules and their sources are docs/regime.md. Pure functions without torch; times are seconds, losses nats per token.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from epochal.scale import ideal_decay

# Passes over a text after which further ones bring little at the usual decay (Muennighoff et al. 2023: half of the value
# of a fresh token is lost after about 15 epochs). A single run that could pay for so many has more compute than text.
MANY_EPOCHS = 16
EPOCHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# Chinchilla's law as refitted by Besiroglu et al. 2024: E + A / N**alpha + B / D**beta. E does not matter for a choice.
A, ALPHA, B, BETA = 482.0, 0.3478, 2085.4, 0.3658
# Epochs over which the value of a repeated token falls by 1/e (Muennighoff et al. 2023, R*_D).
REPEAT_VALUE = 15.39

# Shares of the time. The rest is for starting processes, evaluations and the report.
USABLE, TUNING = 0.8, 0.2

LEARNING_RATES = (0.003, 0.01, 0.03)
PROXIES = len(LEARNING_RATES) + 2  # runs of the small model: every lr, and two more decays
STUDENT_EPOCHS = 2  # times those of a member
MEMBERS = (3, 5, 8)  # of an ensemble, as the time allows
TAU = 0.35  # epochs, the averaging window at which the paper's tuned decays lie (spec section 3)
FEWEST_DOCUMENTS = 20  # below this the order of documents hardly differs between epochs and seeds


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a token store holds for training."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A run: its model, its D, its epochs and the worker-seconds it takes."""

    model: str
    parameters: int
    tokens: int  # D
    epochs: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A campaign of one recipe, `best_model`."""

    workers: int
    sequence_length: int
    batch_size: int  # sequences
    final: Shape
    members: int  # 1: no ensemble, no student
    control: Shape  # one pass over the text by the largest model that takes no longer than one final run
    proxy: Shape | None  # the model that lr and decay are tuned on; None: no time for that
    lr: float
    wd: float
    wds: tuple[float, ...]  # that are tried on the proxy
    seconds: float  # of the whole campaign, as a wall clock shows them
    reasons: tuple[str, ...]  # one sentence for each choice


def vocabulary(size: int) -> int:
    """Return the size of a vocabulary for a text of `size` bytes: about half the root of it, a power of two.

    The number of different words grows with about the root of a text's length (Heaps' law).
    """
    ideal = math.sqrt(max(size, 1)) / 2
    return 1 << min(15, max(9, round(math.log2(ideal))))


def batch_tokens(trained: int) -> int:
    """Return the tokens of a batch for a run over `trained` tokens: a power of two that grows with their root.

    The largest batch that costs nothing grows with about the root of the tokens (Zhang et al. 2024). The committed
    campaigns used 512 tokens for runs over 0.8M.
    """
    return int(1 << min(19, max(8, round(math.log2(512 * math.sqrt(trained / 8e5))))))


def decay(lr: float, steps_per_epoch: int) -> float:
    """Return the weight decay whose averaging window is `TAU` epochs.

    The window is 1 / (lr wd steps); the decay is within [0.1, 6.4].
    """
    return _rounded(min(6.4, max(0.1, ideal_decay(TAU, lr=lr, steps_per_epoch=steps_per_epoch))))


def expected_loss(parameters: int, tokens: int, epochs: float) -> float:
    """Return the law's loss above its limit; repeated tokens count for less and less.

    N does not saturate here: with tuned decay larger models stay better (spec section 5).
    """
    fresh = tokens * (1 + REPEAT_VALUE * (1 - math.exp(-(epochs - 1) / REPEAT_VALUE)))
    return float(A / parameters**ALPHA + B / fresh**BETA)


def shapes(
    text: Text, sizes: Mapping[str, int], speeds: Mapping[str, float], *, seconds: float, unit: int
) -> list[Shape]:
    """Return every run that takes at most `seconds`: each model with each number of epochs over the whole text.

    A model that cannot pass over the whole text in that time has one pass over as much as it can. `sizes` are parameters by
    model, `speeds` tokens per second; D is a multiple of `unit` tokens.
    """
    found = []
    for model, parameters in sizes.items():
        affordable = int(seconds * speeds[model])
        for epochs in EPOCHS:
            tokens = min(text.tokens, affordable if epochs == 1 else text.tokens) // unit * unit
            if tokens and tokens * epochs <= affordable:
                time = tokens * epochs / speeds[model]
                found.append(Shape(model=model, parameters=parameters, tokens=tokens, epochs=epochs, seconds=time))
    return found


def best(found: Iterable[Shape]) -> Shape:
    """Return the run of lowest expected loss; the cheaper one of two that are equal within a thousandth."""
    return min(found, key=lambda s: (round(expected_loss(s.parameters, s.tokens, s.epochs), 3), s.seconds))


def choose(
    text: Text,
    seconds: float,
    sizes: Mapping[str, int],
    speeds: Mapping[int, Mapping[str, float]],
    sequence_length: int,
) -> Choice:
    """Choose a campaign that takes about `seconds` of wall clock.

    `sizes` are parameters by model; `speeds` are tokens per second of one worker by model, by number of workers.
    Raises ValueError for a text or a time that is too short for any run.
    """
    if text.tokens < 2 * sequence_length:
        raise ValueError(f"the training text has {text.tokens} tokens; give at least {2 * sequence_length}.")
    usable = USABLE * seconds * (1 - TUNING)
    alone = _final(text, sizes, speeds[1], budget=usable, members=1, unit=sequence_length)
    scarce = alone.epochs >= MANY_EPOCHS
    workers, members = (max(speeds), MEMBERS[0]) if scarce else (1, 1)
    budget = usable * workers
    final = _final(text, sizes, speeds[workers], budget=budget, members=members, unit=sequence_length)
    if scarce:
        rest = budget - _control(final, sizes, speeds[workers]).seconds
        members = max(k for k in MEMBERS if k == members or _work(final, k) <= rest)
    batch = max(1, batch_tokens(final.tokens * final.epochs) // sequence_length)
    # Whole batches in an epoch; a text of less than one batch has a smaller one.
    batch = min(batch, final.tokens // sequence_length)
    tokens = final.tokens // (batch * sequence_length) * batch * sequence_length
    final = replace(final, tokens=tokens)
    control, lr = _control(final, sizes, speeds[workers]), 0.01
    wd = decay(lr, tokens // (batch * sequence_length))
    proxy = _proxy(final, TUNING * USABLE * seconds * workers, sizes, speeds[workers])
    work = _work(final, members) + control.seconds + (PROXIES * proxy.seconds if proxy else 0.0)
    return Choice(
        workers=workers,
        sequence_length=sequence_length,
        batch_size=batch,
        final=final,
        members=members,
        control=control,
        proxy=proxy,
        lr=lr,
        wd=wd,
        wds=tuple(sorted({_rounded(wd / 4), wd, _rounded(wd * 4)})),
        seconds=work / workers / USABLE,
        reasons=_reasons(text, alone, final, members, scarce),
    )


def cautions(text: Text, vocab_size: int, tokens: int) -> list[str]:
    """Return what a user should know of a text, one sentence each.

    `tokens` is D.
    """
    found = []
    if vocab_size > text.tokens / 10:
        found.append(
            f"A vocabulary of {vocab_size:,} is large for {text.tokens:,} training tokens: most of it is seen fewer than ten "
            "times; train a smaller one."
        )
    if tokens < 0.5 * text.tokens:
        found.append(
            f"D = {tokens:,} is {tokens / text.tokens:.1%} of the {text.tokens:,} training tokens. Where the scarcity is not "
            "simulated on purpose, more text helps more than anything else."
        )
    return found


def _work(final: Shape, members: int) -> float:
    """Worker-seconds of the members and of a student of several."""
    # The student has twice the epochs; each of its steps takes a forward pass of every member too, a third of a step.
    student = STUDENT_EPOCHS * (3 + members) / 3 if members > 1 else 0.0
    return final.seconds * (members + student)


def _final(
    text: Text, sizes: Mapping[str, int], speeds: Mapping[str, float], *, budget: float, members: int, unit: int
) -> Shape:
    """Return the best run whose members, student and control take at most `budget` worker-seconds."""
    # Of one pass over a part of the text the control is a run like it, so that each has half of the time.
    known = [s for time in (budget, budget / 2) for s in shapes(text, sizes, speeds, seconds=time, unit=unit)]
    fitting = [s for s in known if _work(s, members) + _control(s, sizes, speeds).seconds <= budget]
    if not fitting:
        raise ValueError(f"{budget:.0f} seconds are too few for any run over {unit} tokens; give more time.")
    return best(fitting)


def _control(final: Shape, sizes: Mapping[str, int], speeds: Mapping[str, float]) -> Shape:
    """Return one pass by the largest model that is as fast as the final run."""
    seconds = {model: final.tokens / speeds[model] for model in sizes}
    fitting = [m for m in sizes if seconds[m] <= final.seconds] or [min(sizes, key=lambda m: seconds[m])]
    model = max(fitting, key=lambda m: sizes[m])
    return Shape(model=model, parameters=sizes[model], tokens=final.tokens, epochs=1, seconds=seconds[model])


def _proxy(final: Shape, seconds: float, sizes: Mapping[str, int], speeds: Mapping[str, float]) -> Shape | None:
    """Return the largest run that five of fit into `seconds`: at most the final model, as many epochs if possible."""
    for epochs in sorted({e for e in EPOCHS if e <= final.epochs}, reverse=True):
        shapes = [
            Shape(model=m, parameters=n, tokens=final.tokens, epochs=epochs, seconds=final.tokens * epochs / speeds[m])
            for m, n in sizes.items()
            if n <= final.parameters and PROXIES * final.tokens * epochs / speeds[m] <= seconds
        ]
        if shapes:
            return max(shapes, key=lambda s: s.parameters)
    return None


def _reasons(text: Text, alone: Shape, final: Shape, members: int, scarce: bool) -> tuple[str, ...]:
    share = f"D = {final.tokens:,} tokens, {final.tokens / text.tokens:.0%} of the training text"
    limit = (
        f"Text is the limit: the time would pay for {alone.epochs} epochs of one model of {alone.parameters:,} parameters, and "
        f"repeats beyond {MANY_EPOCHS} bring little. So {members} models are trained on it, averaged, and distilled into one."
        if scarce
        else f"Compute is the limit: {alone.epochs} epoch{'s' * (alone.epochs > 1)} of one model of {alone.parameters:,} "
        "parameters has the lowest expected loss for the time. All of it goes to one model and its control."
    )
    shape = f"{final.model}: {final.parameters:,} parameters, {final.epochs} epoch{'s' * (final.epochs > 1)}"
    return (share + ".", limit, shape + ", by Chinchilla's law with repeated tokens discounted.")


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
