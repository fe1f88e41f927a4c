"""Layer x strength, with side effects: where the vector works, and what it breaks.

At every layer and strength the vector, and a random one of equal norm (the null), are added at the last prompt token of
the task's queries; at that of another task's few-shot prompts; and at every token of a passage that has nothing to do
with the task. Measured: the share of items whose likeliest next token is the answer's first; how far the next-token
distribution is from few-shot's (d_ntp over the vocabulary, nats); the other task's accuracy; and by how many nats a
token of the passage becomes less likely. A vector that works only where it breaks other things must show it.

Shapes: n prompts, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec.analysis.finding import Cells, Finding, Found, average, panel, share, value
from taskvec.analysis.subject import Subject, likeliest
from taskvec.evaluate.metrics import kl
from taskvec.lm import Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.results import Metric
from taskvec.vector import Edit, TaskVector, Where

STRENGTHS = (0.5, 1.0, 2.0, 4.0)
LAYERS = 10
"""Layers that are tried, evenly spread."""
PASSAGE = (
    "The harbour lay quiet in the early morning. A few boats were tied to the stone wall, and the water between them "
    "hardly moved. An old man sat on a crate, mending a net with slow and careful hands, while two gulls argued over "
    "something on the steps. Behind the houses the road climbed towards the hills, and a bus was coming down it, empty "
    "at this hour but for the driver and a boy with a violin case."
)
HELD_OUT = "accuracy, other half"
Marks = tuple[str, int, float]
"""(vector or random, layer, strength)."""


def sweep(subject: Subject) -> Finding:
    """All settings, and the best of them by accuracy with what it costs."""
    depth = subject.lm.n_layers
    layers = sorted({*np.linspace(0, depth - 1, min(LAYERS, depth)).round().astype(int).tolist(), subject.layer})
    settings: list[Marks] = [(name, layer, s) for name in ("vector", "random") for layer in layers for s in STRENGTHS]
    found = [*_on_task(subject, settings), *_on_other(subject, settings), *_on_passage(subject, settings)]
    curves = (one for one in found if "layer" in one[0] and one[0]["measure"] != HELD_OUT)
    by_strength = [({**of, "curve": _curve(of)}, metric) for of, metric in curves]
    measures = dict.fromkeys(of["measure"] for of, _ in by_strength)
    nulls = [_curve({"vector": "random", "strength": strength}) for strength in STRENGTHS]
    drawn = (panel(m, by_strength, by="curve", where={"measure": m}, nulls=nulls) for m in measures)
    return Finding("sweep", "Layer and strength", _best(subject, found), tuple(drawn), found)


def _curve(of: Cells) -> str:
    return f"x {of['strength']:g}" + (", random" if of["vector"] == "random" else "")


def _vector(subject: Subject, mark: Marks) -> TaskVector:
    name, layer, strength = mark
    row = subject.direction if name == "vector" else subject.random(0)
    return subject.added(row * strength, layer)


def _on_task(subject: Subject, settings: list[Marks]) -> Iterator[tuple[Cells, Metric]]:
    few = replay(subject.lm, subject.behind).answer(
        [Trial(i) for i in range(len(subject.behind))], Ask(keep=lambda _, logits: logits)
    )

    def keep(i: int, logits: Tensor) -> Tensor:
        hit = (logits.argmax() == subject.golds[i]).float()
        return torch.stack([hit, kl(few.kept[i].to(logits)[None], logits[None])[0]])

    seen = dict[Marks, Tensor]()
    for mark in settings:
        trials = [Trial(i, _vector(subject, mark)) for i in range(len(subject.bare))]
        seen[mark], far = subject.engine.answer(trials, Ask(keep=keep)).kept.T
        yield _cells(mark, "accuracy"), share(seen[mark] > 0)
        yield _cells(mark, "d_ntp_full"), average(far)
    half = len(subject.bare) // 2
    for name in ("vector", "random"):
        best = max((mark for mark in settings if mark[0] == name), key=lambda mark: float(seen[mark][:half].mean()))
        yield _cells(best, HELD_OUT), share(seen[best][half:] > 0)


def _on_other(subject: Subject, settings: list[Marks]) -> Iterator[tuple[Cells, Metric]]:
    if subject.beside.task is None:
        return
    prompts, golds = subject.others
    engine, measure = replay(subject.lm, prompts, keep=True), f"accuracy on {subject.beside.task.name}"

    def hits(vector: TaskVector | None) -> Metric:
        trials = [Trial(i, vector) for i in range(len(prompts))]
        return share(engine.answer(trials, Ask(keep=likeliest)).kept == torch.tensor(golds))

    yield {"vector": "none", "measure": measure}, hits(None)
    for mark in settings:
        yield _cells(mark, measure), hits(_vector(subject, mark))


def _on_passage(subject: Subject, settings: list[Marks]) -> Iterator[tuple[Cells, Metric]]:
    ids = subject.lm.encode(PASSAGE).ids
    engine = replay(subject.lm, [Encoded(ids[:1])], starts=[0], keep=True)

    def losses(vector: TaskVector | None) -> Tensor:
        ((_, (logits,)),) = engine.batches([Trial(0, vector, ids[1:-1])])
        return cross_entropy(logits.float().cpu(), torch.tensor(ids[1:]), reduction="none")

    with torch.no_grad():
        clean = losses(None)
        for mark in settings:
            moved = _vector(subject, mark).edits[0]
            everywhere = TaskVector((Edit(moved.site, moved.op, Where("all"), moved.strength),))
            yield _cells(mark, "damage"), average(losses(everywhere) - clean)


def _cells(mark: Marks, measure: str) -> Cells:
    return {"vector": mark[0], "layer": mark[1], "strength": mark[2], "measure": measure}


def _best(subject: Subject, found: Found) -> str:
    (at, accuracy), (_, null) = (
        next(one for one in found if one[0]["measure"] == HELD_OUT and one[0]["vector"] == name)
        for name in ("vector", "random")
    )
    setting = {name: at[name] for name in ("vector", "layer", "strength")}
    damage = value(found, **setting, measure="damage")
    cost = f"{damage.value:.2f} [{damage.low:.2f}, {damage.high:.2f}] nats a token of unrelated text"
    says = (
        f"Chosen on half of the items: layer {at['layer']}, strength {at['strength']:g}; on the other half it gives "
        f"{accuracy.value:.2f} of the answers' first tokens (a random vector, chosen alike: {null.value:.2f}), at a "
        f"cost of {cost} if it were added everywhere"
    )
    if subject.beside.task is None:
        return f"{says}."
    measure = f"accuracy on {subject.beside.task.name}"
    before, after = value(found, vector="none", measure=measure), value(found, **setting, measure=measure)
    return f"{says}; few-shot {subject.beside.task.name} goes from {before.value:.2f} to {after.value:.2f} under it."
