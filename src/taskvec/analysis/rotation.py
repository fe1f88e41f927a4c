"""Rotation and stretch (arXiv 2509.24169, section "Analyses"): what the map from a layer to the last state does to a
vector.

The mean Jacobian J_l (see `propagation`) is split into J = Q S, Q orthogonal (the rotation), S symmetric and positive
semidefinite (the stretch). By layer: the cosine of v and Q v, |S v| / |v|, and how much of Q v lies in the span of the
task's outputs' unembedding rows. The nulls are random vectors of equal norm in the same maps, and random tokens, as
many: a map that rotates everything rotates the vector too. At the last layer J, and so Q, is the identity. The vector's
own numbers have an interval over prompts, by a jackknife that leaves out groups of them (`propagation.GROUPS`); that of
random vectors is the range that 95 % of them lie in.

One vector is looked at in every layer's map: the curves say what maps do, not what vectors trained at other layers
would do. Q is unique where J is invertible; `smallest singular value`, as a share of the largest, says how nearly
it is not. A fitted map of too few draws is not identified at all (`propagation.fitted_map` refuses it).

Shapes: L layers, d width of the residual stream, m vectors, r dimensions of the span of the outputs.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, jackknifed, panel, value
from taskvec.analysis.lens import alignment, spans, top_tokens
from taskvec.analysis.propagation import grouped, jacobians
from taskvec.analysis.subject import Subject
from taskvec.results import Metric

RANDOM = 20
"""Random vectors of equal norm."""
VECTOR, NULL, TOKENS = "the vector", "random vectors", "the vector, random tokens"


def polar(w: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """(Q, S) of W = Q S: the nearest orthogonal matrix, and what is left, symmetric and positive semidefinite."""
    u, s, vh = torch.linalg.svd(w)
    return u @ vh, (vh.mT * s) @ vh


def rotation(subject: Subject) -> Finding:
    """Cosine, stretch and alignment by layer, beside random vectors."""
    found: Found = list(_measured(subject))
    measures = ("cos(v, Qv)", "|Sv| / |v|", "alignment of Qv", "alignment of v")
    drawn = tuple(panel(m, found, by="of", where={"measure": m}, nulls=[NULL, TOKENS]) for m in measures)
    return Finding("rotation", "Rotation and stretch", _says(subject, found), drawn, found)


def _measured(subject: Subject) -> Iterator[tuple[Cells, Metric]]:
    rows = torch.stack([subject.direction, *(subject.random(number) for number in range(RANDOM))])
    outputs, random = spans(subject, subject.labels)
    groups = len(grouped(subject))
    less = [jacobians(subject, without=group) for group in range(groups)] if groups > 1 else []
    for layer, j in enumerate(jacobians(subject)):
        q, s = polar(j.double())
        sizes = torch.linalg.eigvalsh(s)
        least = float(sizes[0].clamp_min(0) / sizes[-1])
        yield {"layer": layer, "measure": "smallest singular value", "of": "J"}, Metric(least, least, least)
        whole = _numbers(q, s, rows, outputs)
        parts = [_numbers(*polar(one[layer].double()), rows[:1], outputs) for one in less]
        for measure, numbers in whole.items():
            own, null = float(numbers[0]), numbers[1:].double()
            interval = jackknifed(own, [float(part[measure][0]) for part in parts])
            yield {"layer": layer, "measure": measure, "of": VECTOR}, interval
            low, high = (float(null.quantile(part)) for part in (0.025, 0.975))
            yield {"layer": layer, "measure": measure, "of": NULL}, Metric(float(null.mean()), low, high)
        turned = rows[:1] @ q.float().T
        for measure, some in (("alignment of Qv", turned), ("alignment of v", rows[:1])):
            drawn = torch.cat([alignment(one, some) for one in random])
            yield {"layer": layer, "measure": measure, "of": TOKENS}, average(drawn)


def _numbers(
    q: Float[Tensor, "d d"], s: Float[Tensor, "d d"], rows: Float[Tensor, "m d"], outputs: Float[Tensor, "d r"]
) -> dict[str, Float[Tensor, " m"]]:
    """Each row's cosine, stretch and alignment under Q S."""
    turned = rows @ q.float().T
    return {
        "cos(v, Qv)": torch.cosine_similarity(rows, turned, dim=1),
        "|Sv| / |v|": (rows @ s.float().T).norm(dim=1) / rows.norm(dim=1),
        "alignment of Qv": alignment(outputs, turned),
        "alignment of v": alignment(outputs, rows),
    }


def _says(subject: Subject, found: Found) -> str:
    def of(measure: str, name: str = VECTOR) -> float:
        return value(found, layer=subject.layer, measure=measure, of=name).value

    q, _ = polar(jacobians(subject)[subject.layer].double())
    turned = (q @ subject.direction.double()).float()
    words = [
        ", ".join(repr(subject.lm.decode([token])) for token in top_tokens(subject, row, 3))
        for row in (subject.direction, turned)
    ]
    return (
        f"At {subject.edit.site} the rotation leaves the vector at a cosine of {of('cos(v, Qv)'):.2f} (random vectors "
        f"{of('cos(v, Qv)', NULL):.2f}) and the stretch makes it {of('|Sv| / |v|'):.1f} times as long (random "
        f"{of('|Sv| / |v|', NULL):.1f}); in the span of the task's outputs lie {of('alignment of v'):.2f} of it, "
        f"{of('alignment of Qv'):.2f} rotated (random vectors {of('alignment of Qv', NULL):.2f}). It reads "
        f"{words[0]}, rotated {words[1]}."
    )
