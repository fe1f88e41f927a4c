"""Linear propagation (arXiv 2509.24169, section "Analyses"): is the shift of the last state a linear map of the vector?

With h the output of the last block at the last prompt token, before the final norm, the shift of a vector v at layer l

    Delta_l(v) = mean over prompts of h(v) - h

is compared with J_l v, J_l the mean Jacobian dh / dh_l over prompts. The paper fits a map by least squares to noised
copies of one vector and looks at that very vector: any map that fits it passes. Here the map is held against vectors it
was not made with, on prompts it was not made with: the vector itself, random ones of equal norm, their sums. The zero
map explains 0; the constant shift (what the vector does, whatever is added to it) is the one to beat on the sums. Then
additivity, |D(a + b) - D(a) - D(b)| / |D(a + b)|; homogeneity, |D(2v) - 2 D(v)| / |D(2v)|; how much of the shift is the
same for all prompts, |mean shift|^2 / mean |shift|^2; and whether the map's image, added at the last layer, does what
the vector did. At the vector's own layer the map is tried at other strengths (a Jacobian is right for small ones); and
a map is fitted to noised vectors, with noise as large as the vector, on enough draws to be identified, and tested on
others.

Shapes: n prompts, G groups of prompts, L layers, d width of the residual stream, e entries of it, m vectors, k draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, panel, places, value
from taskvec.analysis.subject import Subject
from taskvec.errors import InputError
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.results import Metric, bootstrap
from taskvec.sites import Site
from taskvec.vector import Add, Edit, TaskVector

PROMPTS = 12
"""Prompts that Jacobians and shifts are averaged over."""
GROUPS = 4
"""Groups of these, each of which is left out once for an interval."""
AT_ONCE = 32
"""Rows of the Jacobian in one backward pass."""
LAYERS = 8
"""Layers at which shifts are measured."""
RANDOM = 6
"""Random vectors of equal norm."""
STRENGTHS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
OWN, NULL, CONSTANT = "the vector", "random vectors", "constant shift, of sums"
FLOOR = -1.0
"""Where pictures of R² end: all that is negative is worse than no prediction."""
ENOUGH = 4
"""Draws for each dimension, below which a fitted map is not identified."""


def propagation(subject: Subject) -> Finding:
    """How linear, by layer; and the fitted map at the vector's own layer."""
    found: Found = [*_by_layer(subject), *_by_strength(subject)]
    found += _fitted(subject, ENOUGH * len(subject.direction) + 64)
    found += _causal(subject)
    nulls = [CONSTANT, f"J, {NULL}", NULL]
    by_layer = panel("share of the shift explained", found, by="by", where={"measure": "R2"}, nulls=nulls)
    by_strength = panel("by strength", found, by="of", x="strength", where={"measure": "reach"}, nulls=nulls)
    drawn = (
        replace(by_layer, floor=FLOOR),
        replace(by_strength, floor=FLOOR),
        panel("error of linearity", found, by="of", where={"measure": "error"}),
        panel("alike for all prompts", found, by="of", where={"measure": "alike"}, nulls=[NULL]),
        places("accuracy", found, x="of", by="measure", where={"measure": "accuracy"}),
        places("held-out draws at its layer", found, x="map", by="on", where={"measure": "fit"}),
    )
    return Finding("propagation", "Linear propagation", _says(subject, found), drawn, found)


# --- the mean Jacobian -----------------------------------------------------------------------------------------------


def jacobians(subject: Subject, *, without: int | None = None) -> Float[Tensor, "L d d"]:
    """The mean of dh / dh_l over the first prompts, or over these without one of their groups (`grouped`)."""
    kept = [group for group in range(len(grouped(subject))) if group != without]
    return summed(subject)[kept].sum(0) / sum(len(grouped(subject)[group]) for group in kept)


def grouped(subject: Subject) -> list[range]:
    """The numbers of the first prompts, dealt to `GROUPS` groups, or one each where they are fewer."""
    n = len(subject.bare[:PROMPTS])
    groups = min(GROUPS, n)
    return [range(group, n, groups) for group in range(groups)]


@lru_cache(maxsize=1)
def summed(subject: Subject) -> Float[Tensor, "G L d d"]:
    """dh / dh_l summed over each group, for all layers at once: each backward pass gives some rows of every layer's
    (`AT_ONCE` copies of the prompts in one pass, each asked for one entry of h). Those of the last subject are kept:
    two analyses read them."""
    lm, d, groups = subject.lm, len(subject.direction), grouped(subject)
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    engine, out = replay(lm, subject.bare[:PROMPTS], keep=True), torch.zeros(len(groups), lm.n_layers, d, d)
    for first in range(0, d, AT_ONCE):
        entries = range(first, min(first + AT_ONCE, d))
        out[:, :, list(entries)] = _entries(engine, entries, d, group_of)
    return out


def _entries(engine: Packed | Plain, entries: range, d: int, group_of: Mapping[int, int]) -> Float[Tensor, "G L e d"]:
    """The gradients of some entries of h by a shift of every layer, summed over each group of prompts, which share the
    leaves of one entry."""
    lm, n = engine.lm, len(engine.prompts)
    sites = [Site("resid", layer) for layer in range(lm.n_layers)]
    leaves = [torch.zeros(len(set(group_of.values())), len(sites), d, requires_grad=True) for _ in entries]
    vectors = [
        [TaskVector(tuple(Edit(site, Add(row)) for site, row in zip(sites, rows, strict=True))) for rows in leaf]
        for leaf in leaves
    ]
    trials = [Trial(i, own[group_of[i]]) for own in vectors for i in range(n)]
    with lm.frozen(), torch.enable_grad():
        for numbers, states in engine.reached(trials, sites[-1]):
            asked = torch.tensor([entries[number // n] for number in numbers], device=states.device)
            states.gather(1, asked[:, None]).sum().backward()  # type: ignore[no-untyped-call]
    return torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None], 2)


# --- shifts ----------------------------------------------------------------------------------------------------------


def held(subject: Subject) -> range:
    """The prompts that shifts are measured on: as many as the Jacobian's, others than those where there are others."""
    n = len(subject.bare)
    return range(PROMPTS, min(n, 2 * PROMPTS)) if n > PROMPTS + 1 else range(n)


def shifts(subject: Subject, layer: int, rows: Float[Tensor, "m d"]) -> Float[Tensor, "m n d"]:
    """h(v) - h of held-out prompts, for each row as the vector at a layer."""
    last, prompts = Site("resid", subject.lm.n_layers - 1), held(subject)
    vectors = [None, *(subject.added(row, layer) for row in rows)]
    trials = [Trial(i, vector) for vector in vectors for i in prompts]
    found = subject.engine.answer(trials, Ask(states=(last,))).states[last].reshape(len(vectors), len(prompts), -1)
    return found[1:] - found[:1]


def explained(predicted: Float[Tensor, "m d"], found: Float[Tensor, "m n d"]) -> Metric:
    """1 - |mean - predicted|^2 / |mean|^2, summed over vectors, of their mean shifts over prompts; the interval is by
    prompt."""
    guess, each = predicted.double().numpy(), found.double().transpose(0, 1).flatten(1).numpy()
    n = len(each)

    def ratio(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = _weights(picked)
        mean = weights @ each
        return np.asarray(1 - ((mean - guess.ravel()) ** 2).sum(-1) / (mean**2).sum(-1))

    return bootstrap(ratio, n)


def _weights(picked: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each of n items is among n drawn ones, as a share."""
    shares: NDArray[np.float64] = (picked[..., None] == np.arange(picked.shape[-1])).mean(-2)
    return shares


def alike(found: Float[Tensor, "m n d"]) -> Metric:
    """|mean shift|^2 / mean |shift|^2, averaged over vectors: 1 where the shift is the same for all prompts, about
    1 / n where prompts have nothing in common; the interval is by prompt."""
    gram = torch.einsum("mid,mjd->mij", found.double(), found.double()).numpy()
    n = gram.shape[1]

    def ratio(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        weights = _weights(picked)
        whole = np.einsum("...i,mij,...j->...m", weights, gram, weights)
        return np.asarray((whole / np.einsum("...i,mii->...m", weights, gram)).mean(-1))

    return bootstrap(ratio, n)


def _by_strength(subject: Subject) -> Iterator[tuple[Cells, Metric]]:
    """The map at the vector's own layer: how far it reaches."""
    j = jacobians(subject)[subject.layer]
    for name, some in ((OWN, [subject.direction]), (NULL, [subject.random(number) for number in range(RANDOM)])):
        rows = torch.stack(some)
        for strength in STRENGTHS:
            found = shifts(subject, subject.layer, strength * rows)
            yield {"measure": "reach", "of": name, "strength": strength}, explained(strength * rows @ j.T, found)


def _by_layer(subject: Subject) -> Iterator[tuple[Cells, Metric]]:
    vector, depth, maps = subject.direction, subject.lm.n_layers, jacobians(subject)
    layers = sorted({*np.linspace(0, depth - 1, min(LAYERS, depth)).round().astype(int).tolist(), subject.layer})
    random = torch.stack([subject.random(number) for number in range(RANDOM)])
    rows = torch.stack([vector, 2 * vector, *random, *(vector + one for one in random)])
    for layer in layers:
        found, image = shifts(subject, layer, rows), rows @ maps[layer].T
        mean, at = found.mean(1), {"layer": layer}
        first, nulls, sums = slice(0, 1), slice(2, 2 + RANDOM), slice(2 + RANDOM, None)
        for by, some in (("J, the vector", first), ("J, random vectors", nulls), ("J, sums", sums)):
            yield {**at, "measure": "R2", "by": by}, explained(image[some], found[some])
        constant = mean[first].expand(RANDOM, -1)
        yield {**at, "measure": "R2", "by": CONSTANT}, explained(constant, found[sums])
        parts = mean[first] + mean[nulls]
        yield {**at, "measure": "error", "of": "additivity"}, average(_apart(mean[sums], parts))
        yield {**at, "measure": "error", "of": "homogeneity"}, average(_apart(found[1], 2 * found[0]))
        for name, some in ((OWN, first), (NULL, nulls)):
            yield {**at, "measure": "alike", "of": name}, alike(found[some])


def _apart(one: Float[Tensor, "k d"], two: Float[Tensor, "k d"]) -> Float[Tensor, " k"]:
    """|one - two| / |one|."""
    apart: Tensor = (one - two).norm(dim=1) / one.norm(dim=1)
    return apart


# --- a fitted map ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Draws:
    """Vectors and the shifts they make, each on one of the prompts."""

    rows: Float[Tensor, "k d"]
    moved: Float[Tensor, "k d"]


def drawn(subject: Subject, count: int, make: Callable[[Tensor], Tensor], *, seed: int) -> Draws:
    """`count` vectors made of noise of the vector's norm, at its layer, prompt after prompt."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, len(subject.direction), generator=generator)
    rows = make(noise * (subject.direction.norm() / noise.norm(dim=1, keepdim=True)))
    last, prompts = Site("resid", subject.lm.n_layers - 1), len(subject.bare[:PROMPTS])
    trials = [Trial(i % prompts, subject.added(row, subject.layer)) for i, row in enumerate(rows)]
    clean = subject.states(subject.bare[:PROMPTS], None, [last])[last]
    found = subject.engine.answer(trials, Ask(states=(last,))).states[last]
    return Draws(rows, found - clean[torch.arange(count) % prompts])


def fitted_map(rows: Float[Tensor, "k d"], moved: Float[Tensor, "k d"]) -> Float[Tensor, "d d"]:
    """W with moved = W row, by least squares. Raises `InputError` below `ENOUGH` draws for each dimension: W would
    depend on the solver (a fit of few draws passes every test at the vector itself)."""
    k, d = rows.shape
    if k < ENOUGH * d:
        raise InputError(f"at least {ENOUGH * d} draws for a map of {d} dimensions", str(k), "draw more")
    solution: Tensor = torch.linalg.lstsq(rows.double(), moved.double()).solution
    return solution.T.float()


def fits(predicted: Float[Tensor, "k d"], moved: Float[Tensor, "k d"]) -> Metric:
    """1 - |moved - predicted|^2 / |moved|^2, each draw on its own prompt; the interval is by draw."""
    wrong, whole = ((part.double() ** 2).sum(1).numpy() for part in (moved - predicted, moved))

    def ratio(picked: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(1 - wrong[picked].sum(-1) / whole[picked].sum(-1))

    return bootstrap(ratio, len(wrong))


def _fitted(subject: Subject, count: int) -> Iterator[tuple[Cells, Metric]]:
    own = subject.direction
    made = drawn(subject, count, lambda noise: own + noise, seed=subject.seed)
    around = drawn(subject, 100, lambda noise: own + noise, seed=subject.seed + 1)
    away = drawn(subject, 100, lambda noise: noise, seed=subject.seed + 2)
    maps = {"fitted": fitted_map(made.rows, made.moved), "mean Jacobian": jacobians(subject)[subject.layer]}
    constant = made.moved.mean(0)
    for on, test in (("the vector + noise", around), ("noise alone", away)):
        for name, one in maps.items():
            yield {"measure": "fit", "map": name, "on": on}, fits(test.rows @ one.T, test.moved)
        guess = constant.expand_as(test.moved)
        yield {"measure": "fit", "map": "constant shift", "on": on}, fits(guess, test.moved)


def _causal(subject: Subject) -> Iterator[tuple[Cells, Metric]]:
    """The map's image in the vector's place, added at the last layer."""
    top = subject.lm.n_layers - 1
    image = jacobians(subject)[subject.layer]
    cases: Sequence[tuple[str, TaskVector | None]] = (
        ("zero-shot", None),
        ("the vector", subject.vector),
        ("J v at the last layer", subject.added(image @ subject.direction, top)),
        ("J random at the last layer", subject.added(image @ subject.random(0), top)),
        ("the vector at the last layer", subject.added(subject.direction, top)),
    )
    for name, vector in cases:
        yield {"measure": "accuracy", "of": name}, subject.accuracy(vector)


def _says(subject: Subject, found: Found) -> str:
    def r2(by: str) -> str:
        metric = value(found, measure="R2", by=by, layer=subject.layer)
        return f"{metric.value:.2f}"

    fit = value(found, measure="fit", map="fitted", on="noise alone").value
    did, does = (value(found, measure="accuracy", of=of).value for of in ("the vector", "J v at the last layer"))
    return (
        f"At {subject.edit.site} the mean Jacobian explains {r2('J, the vector')} of the vector's own shift of the "
        f"last state and {r2('J, random vectors')} of random vectors' (the constant shift explains of their "
        f"sums: {r2(CONSTANT)}); a "
        f"map fitted to noised copies explains {fit:.2f} of what noise alone does. Accuracy {did:.2f} with the vector, "
        f"{does:.2f} with the map's image of it at the last layer."
    )
