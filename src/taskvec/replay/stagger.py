"""Skipping the blocks below each edit: a trial of one token starts at the block it edits, from its prompt's clean
state.

Only for trials whose last token is all that is wanted (a sweep over heads or layers): their keys and values below the
edit are never computed. The clean tokens run in the same pass. Proved at first use, like packing; where it fails, the
pass runs in full.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taskvec.hooks import stagger
from taskvec.lm import LM
from taskvec.replay.tree import ROOT, Segment, Tree
from taskvec.sites import Site
from taskvec.vector import Add, Edit


def join_block(lm: LM, edits: Sequence[Edit]) -> int:
    """The first block that the edits can change; the last one for edits after all of them, and for none."""
    layers = [0 if e.site.kind == "embed" else lm.n_layers - 1 if e.site.layer is None else e.site.layer for e in edits]
    return min(layers, default=lm.n_layers - 1)


@torch.no_grad()
def grow_staggered(tree: Tree, segments: Sequence[Segment]) -> list[Tensor]:
    """The logits (V,) of segments of one token that nothing follows, each run from the first block it edits."""
    lm = tree.lm
    blocks = [join_block(lm, [edit for edit, _ in segment.edits]) for segment in segments]
    order = sorted(range(len(segments)), key=lambda i: blocks[i])
    clean = {_token(segment): Segment(segment.parent, segment.tokens) for segment in segments}
    source = {token: place for place, token in enumerate(clean)}
    sources = [*source.values(), *(source[_token(segments[i])] for i in order)]
    with stagger(lm, [0] * len(clean) + [blocks[i] for i in order], sources):
        grown = tree.grow([*clean.values(), *(segments[i] for i in order)])
    logits = {i: out[-1] for i, out in zip(order, grown.logits[len(clean) :], strict=True)}
    return [logits[i] for i in range(len(segments))]


def _token(segment: Segment) -> tuple[int, tuple[int | float, ...]]:
    """What a segment's clean state depends on: its place in the tree and its token (several may hang on one parent)."""
    tokens = segment.tokens
    return segment.parent, tokens if isinstance(tokens, tuple) else tuple(tokens.flatten().tolist())


def staggers(lm: LM) -> bool:
    """Does the model give the same logits that way? Proved once, on edits at every block."""
    if "staggered" not in lm.proofs:
        lm.proofs["staggered"] = _proof(lm)
    return bool(lm.proofs["staggered"])


def _proof(lm: LM) -> bool:
    vocabulary = lm.vocabulary
    root = Tree(lm).grow([Segment(ROOT, tuple((7 * i + 5) % vocabulary for i in range(8)))]).tree
    generator = torch.Generator().manual_seed(0)
    scale = lm.model.get_input_embeddings().weight.float().std().item()
    segments = []
    for layer in range(lm.n_layers):
        noise = scale * torch.randn(lm.width(Site("resid", layer)), generator=generator)
        segments.append(Segment(0, (11 % vocabulary,), ((Edit(Site("resid", layer), Add(noise)), (0,)),), keep=1))
    try:
        quick = torch.stack(grow_staggered(root, segments)).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError):
        return False
    with torch.no_grad():
        full = torch.stack([out[-1] for out in root.grow(segments).logits]).float()
    allowed = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.1
    return float((quick - full).abs().max()) <= allowed * float(full.max() - full.min())
