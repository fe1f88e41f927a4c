"""Logit lens (nostalgebraist 2020; arXiv 2509.24169 for task vectors): what the stream says, layer by layer, without a
vector, with it, and behind demonstrations.

    logits_m = head(norm(h_m)),    h_m the output of block m at the last prompt token

It is read by putting h_m in the place of the last block's output, so the model's own final norm, soft caps and head
read it, whatever its family. Three measures:

- accuracy: the likeliest token is the answer's first;
- logit difference: the answer's logit minus the mean of the task's other outputs' (first tokens);
- alignment: the share of the norm of h_m inside the span of these tokens' unembedding rows, beside that for random
  tokens, as many (the null: a span of many rows holds much of anything).

Shapes: n prompts, K labels, d width of the residual stream.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, rows
from taskvec.analysis.subject import Subject
from taskvec.replay import Ask, Trial, replay
from taskvec.report.pictures import Picture
from taskvec.report.svg import LOOKS, line, panels, svg
from taskvec.results import Metric, mean
from taskvec.sites import Site
from taskvec.vector import Edit, Replace, TaskVector

NULLS = 20
"""Random label sets."""
MEASURES = ("accuracy", "logit difference", "alignment")
RANDOM = "alignment, random tokens"
States = Mapping[Site, Float[Tensor, "n d"]]


def lens(subject: Subject) -> Finding:
    """The three measures by layer, and what the vector says by itself."""
    sites = [Site("resid", layer) for layer in range(subject.lm.n_layers)]
    conditions = {
        "zero-shot": subject.states(subject.bare, None, sites),
        "vector": subject.states(subject.bare, subject.vector, sites),
        "random vector": subject.states(subject.bare, subject.added(subject.random(0), subject.layer), sites),
        "few-shot": subject.states(subject.behind, None, sites),
    }
    found = [one for name, states in conditions.items() for one in _measured(subject, name, states)]
    words = [subject.lm.decode([token]) for token in top_tokens(subject, subject.direction, 5)]
    says = (
        f"What the stream says at the last prompt token, by layer; the vector is added at {subject.edit.site}. Read by "
        f"itself it says {', '.join(map(repr, words))}."
    )
    return Finding("lens", _picture(found, says), rows(found))


def top_tokens(subject: Subject, row: Float[Tensor, " d"], count: int) -> list[int]:
    """The tokens that a vector by itself makes likeliest."""
    (logits,) = read(subject, row[None], lambda _, logits: logits)
    return [int(token) for token in logits.topk(count).indices]


def alignment(rows: Float[Tensor, "K d"], h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The share of each state's norm inside the span of rows."""
    basis = torch.linalg.qr(rows.double().T).Q
    share: Tensor = (h.double() @ basis).norm(dim=1) / h.double().norm(dim=1)
    return share.float()


def read(subject: Subject, h: Float[Tensor, "n d"], keep: Callable[[int, Tensor], Tensor]) -> Float[Tensor, "n ..."]:
    """What to keep of the logits that the model's own end makes of states, row i in prompt i's place."""
    last = Site("resid", subject.lm.n_layers - 1)
    trials = [Trial(i, TaskVector((Edit(last, Replace(row)),))) for i, row in enumerate(h)]
    return replay(subject.lm, subject.bare).answer(trials, Ask(keep=keep)).kept


def _measured(subject: Subject, name: str, states: States) -> Iterator[tuple[Cells, Metric]]:
    labels = torch.tensor(subject.labels)
    unembedding = subject.lm.model.get_output_embeddings().weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(subject.seed)
    sets = [torch.randperm(len(unembedding), generator=generator)[: len(labels)] for _ in range(NULLS)]

    def keep(i: int, logits: Tensor) -> Tensor:
        gold = subject.golds[i]
        others = logits[labels[labels != gold]]
        apart = logits[gold] - others.mean() if len(others) else logits.new_zeros(())
        return torch.stack([(logits.argmax() == gold).float(), apart])

    for site, h in states.items():
        hits, apart = read(subject, h, keep).T
        nulls = torch.stack([alignment(unembedding[some], h) for some in sets]).mean(0)
        own = alignment(unembedding[labels], h)
        for measure, values in {**dict(zip(MEASURES, (hits, apart, own), strict=True)), RANDOM: nulls}.items():
            metric = mean(np.asarray(values.double()))
            assert metric is not None
            yield {"condition": name, "layer": site.layer, "measure": measure}, metric


def _picture(found: list[tuple[Cells, Metric]], says: str) -> Picture:
    figure, axes = panels(11.0, 3.4, len(MEASURES))
    names = list(dict.fromkeys(of["condition"] for of, _ in found))
    for ax, measure in zip(axes, MEASURES, strict=True):
        for name, look in zip(names, LOOKS, strict=False):
            curve = [(of["layer"], m) for of, m in found if of["condition"] == name and of["measure"] == measure]
            line(ax, curve, name, look)
        ax.set(xlabel="layer", title=measure)
    null = [(of["layer"], m) for of, m in found if of["condition"] == "vector" and of["measure"] == RANDOM]
    line(axes[2], null, "vector, random tokens", LOOKS[len(names)])
    axes[2].legend(frameon=False, fontsize=7)
    return Picture("lens", "Logit lens", says, svg(figure))
