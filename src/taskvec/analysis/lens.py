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

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, panel, share
from taskvec.analysis.subject import Subject
from taskvec.replay import Ask, Trial
from taskvec.report.curves import Curve, Panel
from taskvec.results import Metric
from taskvec.sites import Site
from taskvec.vector import Edit, Replace, TaskVector

NULLS = 20
"""Random label sets."""
MEASURES = ("accuracy", "logit difference", "alignment")
RANDOM = "alignment, random tokens"
States = Mapping[Site, Float[Tensor, "n d"]]
Spans = tuple[Float[Tensor, "d r"], list[Float[Tensor, "d r"]]]


def lens(subject: Subject) -> Finding:
    """The three measures by layer, and what the vector says by itself."""
    sites = [Site("resid", layer) for layer in range(subject.lm.n_layers)]
    conditions = {
        "zero-shot": subject.states(subject.bare, None, sites),
        "vector": subject.states(subject.bare, subject.vector, sites),
        "random vector": subject.states(subject.bare, subject.added(subject.random(0), subject.layer), sites),
        "few-shot": subject.states(subject.behind, None, sites),
    }
    both = spans(subject, subject.labels)
    found = [one for name, states in conditions.items() for one in _measured(subject, name, states, both)]
    words = [subject.lm.decode([token]) for token in top_tokens(subject, subject.direction, 5)]
    says = (
        f"What the stream says at the last prompt token, by layer; the vector is added at {subject.edit.site}. Read by "
        f"itself it says {', '.join(map(repr, words))}."
    )
    return Finding("lens", "Logit lens", says, _panels(found), found)


def top_tokens(subject: Subject, row: Float[Tensor, " d"], count: int) -> list[int]:
    """The tokens that a vector by itself makes likeliest."""
    (logits,) = read(subject, row[None], lambda _, logits: logits)
    return [int(token) for token in logits.topk(count).indices]


def span(rows: Float[Tensor, "K d"]) -> Float[Tensor, "d r"]:
    """An orthonormal basis of what rows span."""
    basis: Tensor = torch.linalg.qr(rows.double().T).Q
    return basis


def alignment(basis: Float[Tensor, "d r"], h: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """The share of each state's norm inside a span."""
    inside: Tensor = (h.double() @ basis).norm(dim=1) / h.double().norm(dim=1)
    return inside.float()


def spans(subject: Subject, labels: Sequence[int]) -> Spans:
    """That of the labels' unembedding rows, and those of random tokens', as many."""
    unembedding = subject.lm.model.get_output_embeddings().weight.detach().float().cpu()
    generator = torch.Generator().manual_seed(subject.seed)
    sets = [torch.randperm(len(unembedding), generator=generator)[: len(labels)] for _ in range(NULLS)]
    return span(unembedding[list(labels)]), [span(unembedding[some]) for some in sets]


def read(subject: Subject, h: Float[Tensor, "n d"], keep: Callable[[int, Tensor], Tensor]) -> Float[Tensor, "n ..."]:
    """What to keep of the logits that the model's own end makes of states, row i in prompt i's place."""
    last = Site("resid", subject.lm.n_layers - 1)
    trials = [Trial(i, TaskVector((Edit(last, Replace(row)),))) for i, row in enumerate(h)]
    return subject.engine.answer(trials, Ask(keep=keep)).kept


def _measured(subject: Subject, name: str, states: States, both: Spans) -> Iterator[tuple[Cells, Metric]]:
    labels, (outputs, random) = torch.tensor(subject.labels), both

    def keep(i: int, logits: Tensor) -> Tensor:
        gold = subject.golds[i]
        others = logits[labels[labels != gold]]
        apart = logits[gold] - others.mean() if len(others) else logits.new_zeros(())
        return torch.stack([(logits.argmax() == gold).float(), apart])

    for site, h in states.items():
        hits, apart = read(subject, h, keep).T
        nulls = torch.stack([alignment(some, h) for some in random]).mean(0)
        own = alignment(outputs, h)
        for measure, values in {**dict(zip(MEASURES, (hits, apart, own), strict=True)), RANDOM: nulls}.items():
            metric = share(values > 0) if measure == "accuracy" else average(values)
            yield {"condition": name, "layer": site.layer, "measure": measure}, metric


def _panels(found: Found) -> tuple[Panel, ...]:
    made = [panel(m, found, by="condition", where={"measure": m}, nulls=["random vector"]) for m in MEASURES]
    (null,) = panel("", found, by="condition", where={"measure": RANDOM, "condition": "vector"}).curves
    last = made.pop()
    return (*made, Panel(last.title, last.x, (*last.curves, Curve("vector, random tokens", null.points, null=True))))
