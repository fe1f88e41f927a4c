"""Rotation and stretch (arXiv 2509.24169, section "Analyses"): what the map from a layer to the last state does to a
vector.

The mean Jacobian J_l (see `propagation`) is split into J = Q S, Q orthogonal (the rotation), S symmetric and positive
semidefinite (the stretch). By layer: the cosine of v and Q v, |S v| / |v|, and how much of Q v lies in the span of the
task's outputs' unembedding rows. The nulls are random vectors of equal norm in the same maps, and random tokens, as
many: a map that rotates everything rotates the vector too. Where J is the identity (the last layer) Q is.

One vector is looked at in every layer's map: the curves say what maps do, not what vectors trained at other layers
would do. Q is unique where J is invertible; `smallest singular value`, as a share of the largest, says how nearly
it is not. A fitted map of too few draws is not identified at all (`propagation.fitted_map` refuses it).

Shapes: L layers, d width of the residual stream, m vectors, K labels.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, panel, value
from taskvec.analysis.lens import alignment, spans, top_tokens
from taskvec.analysis.propagation import jacobians
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
    for layer, j in enumerate(jacobians(subject)):
        q, s = (part.float() for part in polar(j.double()))
        sizes = torch.linalg.svdvals(j.double())
        least = float(sizes[-1] / sizes[0])
        yield {"layer": layer, "measure": "smallest singular value", "of": "J"}, Metric(least, least, least)
        turned = rows @ q.T
        cosines = torch.cosine_similarity(rows, turned, dim=1)
        stretch = (rows @ s.T).norm(dim=1) / rows.norm(dim=1)
        for measure, numbers in (("cos(v, Qv)", cosines), ("|Sv| / |v|", stretch)):
            yield from _both(layer, measure, numbers)
        for measure, some in (("alignment of Qv", turned), ("alignment of v", rows)):
            yield from _both(layer, measure, alignment(outputs, some))
            null = torch.cat([alignment(one, some[:1]) for one in random])
            yield {"layer": layer, "measure": measure, "of": TOKENS}, average(null)


def _both(layer: int, measure: str, numbers: Float[Tensor, " m"]) -> Iterator[tuple[Cells, Metric]]:
    """The vector's own number, and the random vectors' with the range that 95 % of them lie in."""
    own, rest = float(numbers[0]), numbers[1:].double()
    yield {"layer": layer, "measure": measure, "of": VECTOR}, Metric(own, own, own)
    low, high = (float(rest.quantile(part)) for part in (0.025, 0.975))
    yield {"layer": layer, "measure": measure, "of": NULL}, Metric(float(rest.mean()), low, high)


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
