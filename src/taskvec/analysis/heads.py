"""Key heads (arXiv 2509.24169, section "Analyses"): which heads a vector's effect goes through.

    saliency of head k:    s_k = | z_k' dp / dz_k |,    z_k what it hands to the output projection at the last prompt
                           token, p the probability of the answer's first token, both under the vector

for all heads from one backward pass (as printed, the paper takes the absolute value of z alone). It is checked against
exact ablation, p without head k minus p, by rank correlation over heads (of mean sizes, by which heads are ranked, and
of signed means). Then the heads that are most salient on one half of the items are taken out (set to 0) and accuracy is
measured on the other half, beside heads drawn at random from the same layers (the null: salient heads lie in certain
layers, so heads drawn from all would be an easy contrast), and the same heads are taken out of few-shot inference
without the vector. Where they look: the last token's attention to the first token (the sink) and to the last three.
Their overlap with the heads of the largest mean indirect effect (function-vector heads) stands beside that of random
heads of the same layers.

Shapes: n items, L layers, J query heads of a layer, w width of a head.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from taskvec.analysis.attention import attention
from taskvec.analysis.finding import Cells, Finding, Found, average, panel, places, share, value
from taskvec.analysis.subject import Subject, likeliest
from taskvec.errors import InputError
from taskvec.evaluate.drawing import draw, encode_drawn, head_sites
from taskvec.methods.function_vector import NOTHING, Head, attributions, indirect_effects
from taskvec.replay import Ask, Trial, replay
from taskvec.results import Metric, bootstrap
from taskvec.sites import Site
from taskvec.vector import Edit, Replace, TaskVector

DOSES = (1, 2, 5, 10, 20)
"""Percent of the heads above the vector."""
KEY = 10
"""Percent that are called key heads."""
DRAWS = 5
"""Random sets of heads."""
TRIALS = 8
"""Few-shot prompts that function-vector heads are found on, behind as many for the means."""
SHUFFLES = 200
NULL = "random heads of the same layers"


def heads(subject: Subject) -> Finding:
    """Saliency, its check, the dose curve, where key heads look, what they share with function-vector heads."""
    every = [(layer, head) for layer in range(subject.lm.n_layers) for head in range(subject.lm.n_heads)]
    above = [head for head in every if head[0] > subject.layer]
    if len(above) < 100 // max(DOSES):
        wanted = f"at least {100 // max(DOSES)} heads above the vector"
        raise InputError(wanted, f"{len(above)} above {subject.edit.site}", "analyse a vector of an earlier layer")
    saliency = salience(subject)
    exact = ablated(subject, above)
    half = len(subject.bare) // 2
    ranked = ranking(saliency[:half], above)
    key = ranked[: dose(KEY, above)]
    found: Found = [*_by_layer(saliency, key, subject), *_checked(saliency, exact, above)]
    found += _doses(subject, ranked, range(half, len(subject.bare)))
    found += _looks(subject, key)
    found += _overlap(subject, key, above)
    ways = ("vector", "few-shot")
    drawn = (
        panel("saliency by layer", found, by="of", where={"measure": "saliency"}, nulls=["all heads"]),
        *(
            panel(f"{way}: accuracy by percent out", found, by="heads", x="percent", where={"way": way}, nulls=[NULL])
            for way in ways
        ),
        places("attention of the last token", found, x="to", by="heads", where={"measure": "look"}, nulls=[NULL]),
    )
    return Finding("heads", "Key heads", _says(found, len(above)), drawn, found)


def salience(subject: Subject) -> Float[Tensor, "n L J"]:
    """z' dp/dz of every head under the vector, its sign kept (minus what taking the head out does, to first order)."""
    lm = subject.lm
    zeros = torch.zeros(lm.n_layers, lm.n_heads, lm.width(Site("heads", 0, 0)))
    return -attributions(lm, subject.bare, subject.golds, zeros, base=subject.vector)


def ablated(subject: Subject, some: Sequence[Head]) -> Float[Tensor, "n k"]:
    """p without a head, minus p, one head at a time: exactly."""
    lm = subject.lm
    zeros = torch.zeros(lm.n_layers, lm.n_heads, lm.width(Site("heads", 0, 0)))
    return indirect_effects(lm, subject.bare, subject.golds, zeros, some, base=subject.vector)


def ranking(saliency: Float[Tensor, "n L J"], some: Sequence[Head]) -> list[Head]:
    """Heads by mean absolute saliency, the largest first."""
    mean = saliency.abs().mean(0)
    return sorted(some, key=lambda head: (-float(mean[head]), head))


def dose(percent: int, some: Sequence[Head]) -> int:
    """How many heads a percentage is, at least one."""
    return max(1, round(len(some) * percent / 100))


def matched(key: Sequence[Head], n_heads: int, *, seed: int) -> list[Head]:
    """As many heads of each layer, drawn at random from all of that layer that are not in `key`; from all of them where
    too few are left, so that the two sets overlap there."""
    rng, out = np.random.default_rng(seed), list[Head]()
    for layer in sorted({layer for layer, _ in key}):
        own = [head for at, head in key if at == layer]
        rest = [head for head in range(n_heads) if head not in own]
        pool = rest if len(rest) >= len(own) else list(range(n_heads))
        out += [(layer, int(head)) for head in rng.choice(pool, len(own), replace=False)]
    return out


def _by_layer(saliency: Tensor, key: Sequence[Head], subject: Subject) -> Iterable[tuple[Cells, Metric]]:
    sizes = saliency.abs()
    for layer in range(subject.lm.n_layers):
        yield {"measure": "saliency", "of": "all heads", "layer": layer}, average(sizes[:, layer].mean(1))
        own = [head for at, head in key if at == layer]
        if own:
            yield {"measure": "saliency", "of": "key heads", "layer": layer}, average(sizes[:, layer, own].mean(1))


def _checked(saliency: Tensor, exact: Tensor, above: Sequence[Head]) -> Iterable[tuple[Cells, Metric]]:
    """Rank correlation over heads of first-order and exact effects; the interval is by item."""
    from scipy.stats import rankdata

    layer, head = (torch.tensor(part) for part in zip(*above, strict=True))
    first, whole = (-saliency[:, layer, head]).double().numpy(), exact.double().numpy()
    for of, a, b in (("sizes", np.abs(first), np.abs(whole)), ("signed", first, whole)):

        def spearman(picked: NDArray[np.int64], pair: tuple[Any, Any] = (a, b)) -> NDArray[np.float64]:
            x, y = (rankdata(part[picked].mean(-2), axis=-1) for part in pair)
            x, y = (part - part.mean(-1, keepdims=True) for part in (x, y))
            return np.asarray((x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1)))

        yield {"measure": "rank correlation with exact ablation", "of": of}, bootstrap(spearman, len(first))


def _doses(subject: Subject, ranked: Sequence[Head], items: range) -> Iterable[tuple[Cells, Metric]]:
    engines = {"vector": subject.engine, "few-shot": replay(subject.lm, subject.behind, keep=True)}
    bases = {"vector": subject.vector, "few-shot": NOTHING}
    golds = torch.tensor(subject.golds)[items.start : items.stop]

    def hits(way: str, out: Sequence[Head]) -> Tensor:
        vector = TaskVector((*bases[way].edits, *removed(subject, out).edits))
        kept = engines[way].answer([Trial(i, vector) for i in items], Ask(keep=likeliest)).kept
        return kept == golds

    for way in bases:
        for name in ("key heads", NULL):
            yield {"way": way, "heads": name, "percent": 0}, share(hits(way, ()))
        for percent in DOSES:
            top = ranked[: dose(percent, ranked)]
            yield {"way": way, "heads": "key heads", "percent": percent}, share(hits(way, top))
            sets = [matched(top, subject.lm.n_heads, seed=subject.seed + number) for number in range(DRAWS)]
            drawn = torch.stack([hits(way, one).float() for one in sets])
            yield {"way": way, "heads": NULL, "percent": percent}, average(drawn.mean(0))


def removed(subject: Subject, some: Sequence[Head]) -> TaskVector:
    """These heads' outputs set to 0 at the last prompt token."""
    width = subject.lm.width(Site("heads", 0, 0))
    return TaskVector(tuple(Edit(Site("heads", *head), Replace(torch.zeros(width))) for head in some))


def _looks(subject: Subject, key: Sequence[Head]) -> Iterable[tuple[Cells, Metric]]:
    """Mean over items, then over heads with an interval by head."""
    weights = attention(subject.lm, subject.bare, subject.vector)
    sink = torch.stack([one[..., 0] for one in weights]).mean(0)
    last = torch.stack([one[..., -3:].sum(-1) for one in weights]).mean(0)
    others = [head for number in range(DRAWS) for head in matched(key, subject.lm.n_heads, seed=number)]
    for to, mass in (("first token", sink), ("last three", last)):
        for name, some in (("key heads", key), (NULL, sorted(set(others)))):
            yield {"measure": "look", "heads": name, "to": to}, average([float(mass[head]) for head in some])


def _overlap(subject: Subject, key: Sequence[Head], above: Sequence[Head]) -> Iterable[tuple[Cells, Metric]]:
    """The share of key heads among as many function-vector heads; that of random heads of the same layers, with the
    range of 95 % of the draws."""
    lm, train = subject.lm, subject.task.train
    if train.spec.shots < 2:
        return
    clean = encode_drawn(lm, train, draw(train, TRIALS, seed=subject.seed))[0]
    sites = head_sites(lm)
    states = replay(lm, clean).answer([Trial(i) for i in range(len(clean))], Ask(states=tuple(sites))).states
    means = torch.stack([states[site].mean(0).reshape(lm.n_heads, -1) for site in sites])
    prompts, answers = encode_drawn(lm, train, draw(train, TRIALS, seed=subject.seed, shuffled=True))
    effects = indirect_effects(lm, prompts, [answer[0] for answer in answers], means, list(above)).mean(0)
    best = {above[i] for i in effects.argsort(descending=True, stable=True).tolist()[: len(key)]}

    def shared(some: Sequence[Head]) -> float:
        return len(best & set(some)) / len(key)

    drawn = np.array([shared(matched(key, lm.n_heads, seed=number)) for number in range(SHUFFLES)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    own = Metric(shared(key), shared(key), shared(key))
    yield {"measure": "also function-vector heads", "heads": "key heads"}, own
    null = Metric(float(drawn.mean()), float(low), float(high))
    yield {"measure": "also function-vector heads", "heads": NULL}, null


def _says(found: Found, count: int) -> str:
    def out(way: str, name: str, percent: int = KEY) -> str:
        return f"{value(found, way=way, heads=name, percent=percent).value:.2f}"

    rho = value(found, measure="rank correlation with exact ablation", of="sizes")
    return (
        f"Without the {KEY} % most salient of the {count} heads above the vector accuracy goes from "
        f"{out('vector', NULL, 0)} to {out('vector', 'key heads')} (without random heads of the same layers: "
        f"{out('vector', NULL)}), few-shot's from {out('few-shot', NULL, 0)} to {out('few-shot', 'key heads')} "
        f"({out('few-shot', NULL)}); saliency ranks heads like exact ablation does at rho {rho.value:.2f} "
        f"[{rho.low:.2f}, {rho.high:.2f}]."
    )
