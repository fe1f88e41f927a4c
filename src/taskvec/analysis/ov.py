"""OV reconstruction (arXiv 2509.24169, section "Analyses"): does a vector act through what heads read off it?

A vector theta at layer l is seen by every head above. With the attention weight c of the last token on itself and the
norm's scale s(h) of the stream h that the head reads, both as in the run with the vector, head k of layer m gains

    z_k = c_k W_V (theta * gamma) / s(h)        at the input of the output projection

which is put in there, in all heads of layers l + 1 to m, in place of theta. Beside it stand: the weights left out
(c = 1); the norm left to the vector itself (s(theta)); all gains at once, summed up at layer l; what MLPs make of
theta (MLP(h + theta) - MLP(h)), put in the same way; and necessity: theta stays, and every gain is taken out. The null
is a random vector of equal norm (the mean over `DRAWS` of them), whose gains are put in, or taken out beside theta (the
weights and scales then being those of the run with theta).

W_V theta needs no weights' names: attention over one token is its OV circuit, so it is read off the model's own
one-token pass (grouped queries, fused projections and all). How the norm scales is found the same way, by trying. A
family whose one token does not look at itself alone (attention sinks), or whose heads are no linear map of what they
read (gates), is refused. The paper leaves open whether theta passes the norm; without its scale the sum has no meaning
in the model's stream. Where attention ends with a norm of its own, the sum at layer l is left out: what heads hand over
is not what enters the stream there.

Shapes: n prompts, L layers, J query heads of a layer, w width of a head, d width of the residual stream.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskvec.analysis.attention import attention
from taskvec.analysis.finding import Cells, Finding, Found, average, panel, places, share, value
from taskvec.analysis.subject import Subject
from taskvec.errors import InputError, ModelError
from taskvec.evaluate.drawing import project
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.sites import Site
from taskvec.vector import Add, Edit, Replace, TaskVector

STEPS = 8
"""Upper layers at which the cumulative curves are measured."""
DRAWS = 3
"""Random vectors."""
VECTOR, NULL = "vector", "random vector"
Gains = Mapping[int, Float[Tensor, "n Jw"]]
"""What each prompt's heads gain, by layer."""


def ov(subject: Subject) -> Finding:
    """Accuracy with the OV path in the vector's place, cumulative by layer; and with the path taken out."""
    top = subject.lm.n_layers - 1
    if subject.layer >= top:
        wanted = f"a vector below layer {top}, with heads above it"
        raise InputError(wanted, f"one at {subject.edit.site}", "analyse one of an earlier layer")
    check_heads(subject)
    own = Path(subject, subject.direction)
    found: Found = [({"vector": VECTOR, **of}, share(hits)) for of, hits in _measured(own, own)]
    nulls = [list(_measured(Path(subject, subject.random(number)), own)) for number in range(DRAWS)]
    for same in zip(*nulls, strict=True):
        hits = torch.stack([hits.float() for _, hits in same]).mean(0)
        found.append(({"vector": NULL, **same[0][0]}, average(hits)))
    curves = [({**of, "curve": _curve(of)}, metric) for of, metric in found if "layer" in of]
    dotted = [f"{way}, {NULL}" for way in ("ov", "mlp", "without ov")]
    drawn = (
        panel("in the vector's place, layers up to", curves, by="curve", where={"part": "instead"}, nulls=dotted),
        panel("beside the vector, layers up to", curves, by="curve", where={"part": "beside"}, nulls=dotted),
        places("all layers", found, x="way", by="vector", where={"part": "variants"}, nulls=[NULL]),
    )
    return Finding("ov", "OV reconstruction", _says(found), drawn, found)


@dataclass(frozen=True, eq=False)
class Path:
    """A row added in the vector's place, and what the layers above make of it."""

    subject: Subject
    row: Float[Tensor, " d"]

    @cached_property
    def vector(self) -> TaskVector:
        """The row where the vector was."""
        return self.subject.added(self.row, self.subject.layer)

    @property
    def above(self) -> range:
        """The layers above it."""
        return range(self.subject.layer + 1, self.subject.lm.n_layers)

    @cached_property
    def weights(self) -> Float[Tensor, "n L J"]:
        """The last token's attention to itself, in the run with the row."""
        return torch.stack([one[..., -1] for one in attention(self.subject.lm, self.subject.bare, self.vector)])

    @cached_property
    def scales(self) -> Mapping[int, Float[Tensor, " n"]]:
        """The norm's scale of the stream that each layer above reads, in the run with the row."""
        sites = [Site("resid", layer - 1) for layer in self.above]
        states = self.subject.states(self.subject.bare, self.vector, sites)
        return {layer: self.scale(states[site]) for layer, site in zip(self.above, sites, strict=True)}

    @cached_property
    def scale(self) -> Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]:
        """How the model's norms scale."""
        return norm_scale(self.subject.lm, self.row)

    @cached_property
    def values(self) -> Float[Tensor, "L Jw"]:
        """W_V of the row at every layer, by the norm's scale of the row itself."""
        read = values(self.subject.lm, torch.stack([self.row, torch.zeros_like(self.row)]))
        return read[0] - read[1]

    def gains(self, *, weighted: bool = True, own_scale: bool = False, run: "Path | None" = None) -> Gains:
        """What the heads of each layer above gain, in the run with the row or with another one."""
        run = run or self
        n, alone = len(self.subject.bare), self.scale(self.row[None])[0]
        out = dict[int, Tensor]()
        for layer in self.above:
            rows = self.values[layer].reshape(self.subject.lm.n_heads, -1).expand(n, -1, -1)
            rows = rows if own_scale else rows * (alone / run.scales[layer])[:, None, None]
            out[layer] = (rows * run.weights[:, layer, :, None] if weighted else rows).flatten(1)
        return out

    def through_mlps(self) -> Gains:
        """What each MLP above makes of the row, added to the stream it reads: after attention, or, where the two stand
        side by side, before."""
        clean = self.subject.states(self.subject.bare, None, [Site("mlp", layer) for layer in self.above])
        out = dict[int, Tensor]()
        for layer in self.above:
            site = Site("mlp", layer)
            for before in (Site("attn", layer), Site("resid", layer - 1)):
                vector = TaskVector((Edit(before, Add(self.row), self.subject.edit.where),))
                out[layer] = self.subject.states(self.subject.bare, vector, [site])[site] - clean[site]
                if bool(out[layer].any()):
                    break
        return out


def values(lm: LM, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n L Jw"]:
    """What every layer's heads hand to the output projection where the row is all that they read: a pass over one
    token, whose stream the row replaces before each block."""
    sites = [Site("heads", layer) for layer in range(lm.n_layers)]
    inputs = [Site("embed"), *(Site("resid", layer) for layer in range(lm.n_layers - 1))]
    trials = [Trial(0, TaskVector(tuple(Edit(site, Replace(row)) for site in inputs))) for row in rows]
    found = replay(lm, [ONE_TOKEN]).answer(trials, Ask(states=tuple(sites))).states
    return torch.stack([found[site] for site in sites], 1)


ONE_TOKEN = Encoded((0,))
"""A prompt of one token; which one does not matter."""


def check_heads(subject: Subject) -> None:
    """Raise `ModelError` where attention over one token is not the heads' linear map of it."""
    lm, row = subject.lm, subject.direction
    weights = attention(lm, [ONE_TOKEN], None)[0]
    zero, plus, minus = values(lm, torch.stack([torch.zeros_like(row), row, -row]))
    odd = (plus + minus - 2 * zero).norm() <= _small(lm) * (plus - zero).norm()
    if not odd or float((weights - 1).abs().max()) > _small(lm):
        wanted = "heads that hand over a linear map of what they read, all of it"
        raise ModelError(wanted, f"gates or attention sinks in {lm.id}", "leave ov out for this family")


def norm_scale(lm: LM, row: Float[Tensor, " d"]) -> Callable[[Float[Tensor, "n d"]], Float[Tensor, " n"]]:
    """How the norm before attention scales a stream, found by trying: not at all (no norm there), by its spread about
    its mean (LayerNorm), or by its root mean square."""
    moved = row + row.abs().mean()
    zero, once, twice, shifted = values(lm, torch.stack([torch.zeros_like(row), row, 2 * row, moved]))
    small = _small(lm) * (once - zero).norm()
    if (twice - zero - 2 * (once - zero)).norm() <= small:
        return lambda h: torch.ones(len(h))
    if (shifted - once).norm() <= small:
        return lambda h: h.std(1, correction=0)
    return lambda h: h.square().mean(1).sqrt()


def _small(lm: LM) -> float:
    """What rounding may leave of equal numbers."""
    return 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.03


def _post_normed(lm: LM) -> bool:
    """Does attention end with a norm of its own?"""
    block = lm.blocks[0]
    return block.attn is None or all(part is not block.out_projection for part in block.attn.modules())


def _measured(path: Path, own: Path) -> Iterator[tuple[Cells, Bool[Tensor, " n"]]]:
    """Which items are right, by what is put in, or taken out beside the subject's own vector."""
    subject = path.subject
    gains, beside, mlps = path.gains(), path.gains(run=own), path.through_mlps()
    steps = np.linspace(path.above[0], path.above[-1], min(STEPS, len(path.above))).round().astype(int).tolist()
    whole = dict[str, Tensor]()  # of the last step: all layers
    for layer in dict.fromkeys(steps):
        for part, way, vectors in (
            ("instead", "ov", _edits(subject, "heads", gains, layer)),
            ("instead", "mlp", _edits(subject, "mlp", mlps, layer)),
            ("beside", "without ov", _edits(subject, "heads", beside, layer, beside=own.vector)),
        ):
            whole[way] = subject.hits(vectors)
            yield {"part": part, "way": way, "layer": layer}, whole[way]
    top = path.above[-1]
    ways: dict[str, Sequence[TaskVector | None]] = {
        "zero-shot": [None] * len(subject.bare),
        "itself": [path.vector] * len(subject.bare),
        "ov, weights 1": _edits(subject, "heads", path.gains(weighted=False), top),
        "ov, own norm": _edits(subject, "heads", path.gains(own_scale=True), top),
    }
    if not _post_normed(subject.lm):
        summed = torch.stack([project(subject.lm, layer, rows) for layer, rows in gains.items()]).sum(0)
        like = summed * (path.row.norm() / summed.norm(dim=1, keepdim=True).clamp_min(1e-9))
        ways["ov, summed below"] = [subject.added(one, subject.layer) for one in summed]
        ways["the same, equal norm"] = [subject.added(one, subject.layer) for one in like]
    for way, hits in {**whole, **{way: subject.hits(some) for way, some in ways.items()}}.items():
        yield {"part": "variants", "way": way}, hits


def _edits(
    subject: Subject, kind: str, gains: Gains, top: int, *, beside: TaskVector | None = None
) -> list[TaskVector]:
    """Each prompt's gains of layers up to `top`, put in; or, beside the vector, taken out."""
    sign = 1.0 if beside is None else -1.0
    edits = beside.edits if beside is not None else ()
    sites = [(Site.parse(f"{kind}[{layer}]"), rows) for layer, rows in gains.items() if layer <= top]
    where = subject.edit.where
    return [
        TaskVector((*edits, *(Edit(site, Add(sign * rows[i]), where) for site, rows in sites)))
        for i in range(len(subject.bare))
    ]


def _curve(of: Cells) -> str:
    return str(of["way"]) if of["vector"] == VECTOR else f"{of['way']}, {of['vector']}"


def _says(found: Found) -> str:
    def of(way: str, vector: str = VECTOR) -> str:
        return f"{value(found, part='variants', way=way, vector=vector).value:.2f}"

    return (
        f"Zero-shot {of('zero-shot')}, with the vector {of('itself')}; with only what all heads above read off it "
        f"{of('ov')} (of random vectors {of('ov', NULL)}), with only what MLPs make of it {of('mlp')}; with the vector "
        f"but without what heads read off it {of('without ov')} (off random vectors {of('without ov', NULL)})."
    )
