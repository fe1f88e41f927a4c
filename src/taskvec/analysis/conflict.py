"""Conflict (Hendel et al., arXiv 2310.15916, section 4): the prompt shows one task, the vector is another's. Who wins?

Queries that both tasks have an answer for stand behind demonstrations of the `other` task, and the vector is added at
every layer in turn (at its own strength). Counted: the likeliest first token is the vector's task's answer, or the
other task's. The null is random vectors of equal norm; below layer 0 stands the prompt without any. The layer that is
spoken of is chosen on one half of the items and reported on the other, for the null too.

Shapes: n items, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, panel, value
from taskvec.analysis.subject import Subject, likeliest
from taskvec.errors import InputError
from taskvec.evaluate.observe import encode_answers
from taskvec.lm import Encoded
from taskvec.prompts import Example
from taskvec.replay import Ask, Trial, replay
from taskvec.results import Metric
from taskvec.tasks import Split, Task, builtin_tasks, load_task
from taskvec.vector import TaskVector

LEAST = 8
"""Queries that have an answer in both tasks."""
APART = "past_tense"
"""The task for side effects where none has queries in common."""
DRAWS = 3
"""Random vectors."""
ALONE = -1
"""The layer of no vector."""
OWN, SHOWN, RANDOM = "the vector's task", "the prompt's task", ", random vector"


def conflict(subject: Subject) -> Finding:
    """Whose answers are given, by the vector's layer. Raises `InputError` without another task of enough common
    queries."""
    prompts, own, other = disputed(subject)
    found: Found = list(_measured(subject, prompts, own, other))
    curves = [(of, metric) for of, metric in found if "layer" in of]
    nulls = [OWN + RANDOM, SHOWN + RANDOM]
    drawn = (panel("whose answer, by the vector's layer", curves, by="whose", where={}, nulls=nulls),)
    return Finding("conflict", "Conflict", _says(subject, found, len(prompts)), drawn, found)


def common(one: Split, task: Task) -> list[tuple[int, str]]:
    """Which items of a split another task has a different answer for, and that answer."""
    known = {example.input: example.output for example in task.examples}
    pairs = [(i, known.get(example.input, example.output)) for i, example in enumerate(one.examples)]
    return [(i, output) for i, output in pairs if output != one.examples[i].output]


def rival(task: Task) -> str:
    """The built-in task that answers most of a task's queries, differently; `APART` where none does."""
    counts = dict[str, int]()
    for name in builtin_tasks():
        if name != task.name:
            counts[name] = len(common(task.test, load_task(name, format=task.spec.format, shots=task.spec.shots)))
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else APART


def disputed(subject: Subject) -> tuple[list[Encoded], list[int], list[int]]:
    """The prompts, and the first tokens of both tasks' answers; items where these are one token are left out."""
    other = subject.beside.task
    if other is None:
        raise InputError("another task with the same queries", "none", "name one with --against")
    pairs = common(subject.task.test, other)
    own = [subject.task.test.examples[i] for i, _ in pairs]
    theirs = [replace(example, output=output) for example, (_, output) in zip(own, pairs, strict=True)]
    golds, others = (_first(subject, some) for some in (own, theirs))
    kept = [i for i, (a, b) in enumerate(zip(golds, others, strict=True)) if a != b][: len(subject.bare)]
    if len(kept) < LEAST:
        found = f"{len(kept)} of {subject.task.name} and {other.name}"
        wanted = f"at least {LEAST} test queries that both tasks answer, differently"
        raise InputError(wanted, found, "try another --against")
    asked = {own[i].input for i in kept}
    pool = tuple(example for example in other.train.examples if example.input not in asked)
    demos = replace(other.train, examples=pool).demonstrations(seed=subject.seed)
    prompts = [subject.lm.encode(subject.task.spec.format.prompt(own[i].input, demos)) for i in kept]
    return prompts, [golds[i] for i in kept], [others[i] for i in kept]


def _first(subject: Subject, examples: Sequence[Example]) -> list[int]:
    """The first tokens of their outputs."""
    if not examples:
        return []
    answers = encode_answers(subject.lm, replace(subject.task.test, examples=tuple(examples)))[0]
    return [int(answer[0]) for answer in answers]


def _measured(
    subject: Subject, prompts: list[Encoded], own: list[int], other: list[int]
) -> Iterator[tuple[Cells, Metric]]:
    engine = replay(subject.lm, prompts, keep=True)
    half = len(prompts) // 2
    answers = {OWN: torch.tensor(own), SHOWN: torch.tensor(other)}

    def said(vectors: Sequence[TaskVector | None]) -> Float[Tensor, "m n"]:
        trials = [Trial(i, vector) for vector in vectors for i in range(len(prompts))]
        return engine.answer(trials, Ask(keep=likeliest)).kept.reshape(len(vectors), -1)

    random = [subject.random(number) for number in range(DRAWS)]
    for end, rows in (("", [subject.direction]), (RANDOM, random)):
        hits = dict[int, dict[str, Tensor]]()
        for layer in (ALONE, *range(subject.lm.n_layers)):
            tokens = said([None if layer == ALONE else subject.added(row, layer) for row in rows])
            hits[layer] = {whose: (tokens == gold).float().mean(0) for whose, gold in answers.items()}
            for whose, found in hits[layer].items():
                yield {"whose": whose + end, "layer": layer}, average(found)
        best = max(range(subject.lm.n_layers), key=lambda layer: float(hits[layer][OWN][:half].mean()))
        for whose, found in hits[best].items():
            yield {"held out": whose + end, "best": best}, average(found[half:])


def _says(subject: Subject, found: Found, n: int) -> str:
    assert subject.beside.task is not None

    def of(whose: str) -> float:
        return value(found, **{"held out": whose}).value

    def alone(whose: str) -> float:
        return value(found, whose=whose, layer=ALONE).value

    best = next(cells["best"] for cells, _ in found if cells.get("held out") == OWN)
    return (
        f"Behind examples of {subject.beside.task.name} the model answers {alone(SHOWN):.2f} of {n} queries as they "
        f"say and {alone(OWN):.2f} as {subject.task.name} would; with the vector at layer {best} {of(SHOWN):.2f} and "
        f"{of(OWN):.2f} of the other half (random vectors, at their best layer: {of(SHOWN + RANDOM):.2f} and "
        f"{of(OWN + RANDOM):.2f})."
    )
