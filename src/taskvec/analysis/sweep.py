"""Layer x strength, with side effects: where the vector works, and what it breaks.

At every layer and strength the vector, and a random one of equal norm (the null), are added at the last prompt token of
the task's queries; and at every token of a passage that has nothing to do with the task. Measured: the share of items
whose likeliest next token is the answer's first; how far the next-token distribution is from few-shot's (d_ntp over the
vocabulary, nats); and by how many nats a token of the passage becomes less likely. A vector that works only where it
breaks the passage must show it.

Shapes: n prompts, V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec.analysis.finding import Cells, Finding, rows
from taskvec.analysis.subject import Subject
from taskvec.evaluate.metrics import kl
from taskvec.lm import Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.report.pictures import Picture
from taskvec.report.svg import LOOKS, line, panels, svg
from taskvec.results import Metric, mean
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
Marks = tuple[str, int, float]
"""(vector or random, layer, strength)."""


def sweep(subject: Subject) -> Finding:
    """All settings, and the best of them by accuracy with what it costs."""
    depth = subject.lm.n_layers
    layers = sorted({*np.linspace(0, depth - 1, min(LAYERS, depth)).round().astype(int).tolist(), subject.layer})
    settings: list[Marks] = [(name, layer, s) for name in ("vector", "random") for layer in layers for s in STRENGTHS]
    found = [*_on_task(subject, settings), *_on_passage(subject, settings)]
    return Finding("sweep", _picture(found, _best(found)), rows(found))


def _vector(subject: Subject, mark: Marks) -> TaskVector:
    name, layer, strength = mark
    row = subject.direction if name == "vector" else subject.random(0)
    return subject.added(row * strength, layer)


def _on_task(subject: Subject, settings: list[Marks]) -> Iterator[tuple[Cells, Metric]]:
    few = replay(subject.lm, subject.behind).answer(
        [Trial(i) for i in range(len(subject.behind))], Ask(keep=lambda _, logits: logits)
    )
    engine = replay(subject.lm, subject.bare, keep=True)

    def keep(i: int, logits: Tensor) -> Tensor:
        hit = (logits.argmax() == subject.golds[i]).float()
        return torch.stack([hit, kl(few.kept[i].to(logits)[None], logits[None])[0]])

    for mark in settings:
        trials = [Trial(i, _vector(subject, mark)) for i in range(len(subject.bare))]
        hits, far = engine.answer(trials, Ask(keep=keep)).kept.T
        yield _cells(mark, "accuracy"), _mean(hits)
        yield _cells(mark, "d_ntp_full"), _mean(far)


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
            yield _cells(mark, "damage"), _mean(losses(everywhere) - clean)


def _cells(mark: Marks, measure: str) -> Cells:
    return {"vector": mark[0], "layer": mark[1], "strength": mark[2], "measure": measure}


def _mean(values: Tensor) -> Metric:
    found = mean(np.asarray(values.double()))
    assert found is not None
    return found


def _best(found: list[tuple[Cells, Metric]]) -> str:
    own = [(of, m) for of, m in found if of["vector"] == "vector"]
    best, accuracy = max((one for one in own if one[0]["measure"] == "accuracy"), key=lambda one: one[1].value)
    at = {of["measure"]: m for of, m in own if (of["layer"], of["strength"]) == (best["layer"], best["strength"])}
    cost = f"{at['damage'].value:.2f} [{at['damage'].low:.2f}, {at['damage'].high:.2f}] nats a token of unrelated text"
    return (
        f"Best at layer {best['layer']}, strength {best['strength']:g}: {accuracy.value:.2f} of the answers' first "
        f"tokens, at a cost of {cost} if it were added everywhere."
    )


def _picture(found: list[tuple[Cells, Metric]], says: str) -> Picture:
    figure, axes = panels(11.0, 3.4, 3)
    for ax, measure in zip(axes, ("accuracy", "d_ntp_full", "damage"), strict=True):
        for strength, look in zip(STRENGTHS, LOOKS[1:], strict=False):
            for name, style in (("vector", "-"), ("random", ":")):
                wanted = {"vector": name, "strength": strength, "measure": measure}
                curve = [(of["layer"], m) for of, m in found if wanted.items() <= of.items()]
                line(ax, curve, f"x {strength:g}" + (", random" if name == "random" else ""), look)
                ax.lines[-1].set_linestyle(style)
        ax.set(xlabel="layer", title=measure)
    axes[0].legend(frameon=False, fontsize=6)
    return Picture("sweep", "Layer and strength", says, svg(figure))
