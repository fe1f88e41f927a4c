"""Which engine a model gets: packed where a proof at first use holds, else the plain one, and it says so."""

import logging
from collections.abc import Sequence

import torch

from taskvec.hooks import prove
from taskvec.lm import LM, Encoded
from taskvec.replay.packed import Packed
from taskvec.replay.plain import Plain
from taskvec.replay.tree import ROOT, Segment, Tree
from taskvec.replay.trials import Budget

log = logging.getLogger("taskvec")
NEEDS = ("position_ids", "past_key_values", "logits_to_keep", "attention_mask")
PREFIX, TAIL = 40, 3


def replay(
    lm: LM,
    prompts: Sequence[Encoded],
    *,
    starts: Sequence[int] | None = None,
    budget: Budget | None = None,
    keep: bool = False,
) -> Packed | Plain:
    """An engine over `prompts`. `starts[i]` is the first token of prompt i that a trial may edit (default: its
    last)."""
    prove(lm)
    if packs(lm) is not None:
        return Plain(lm, prompts)
    starts = [p.prompt_length - 1 for p in prompts] if starts is None else starts
    return Packed(lm, prompts, starts, budget or Budget(), keep)


def packs(lm: LM) -> str | None:
    """None if the model can be packed, else the reason why not. Proved once: a two-segment packed pass against the
    plain one, behind a prefix of 40 tokens. No model's name is trusted."""
    if "packed" not in lm.proofs:
        lm.proofs["packed"] = _why_not(lm)
        if lm.proofs["packed"] is not None:
            log.warning("%s runs the plain way (slower, same results): %s", lm.id, lm.proofs["packed"])
    reason: str | None = lm.proofs["packed"]
    return reason


def _why_not(lm: LM) -> str | None:
    missing = [name for name in NEEDS if name not in lm.accepts]
    if missing:
        return f"its forward takes no {', '.join(missing)}"
    try:
        error = _packing_error(lm)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as raised:
        return f"a packed pass failed ({type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''})"
    allowed = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.1
    return None if error <= allowed else f"a packed pass differs from the plain one by {error:.2g} of the logits' range"


@torch.no_grad()
def _packing_error(lm: LM) -> float:
    """The largest difference between packed and plain logits, over the range of the logits."""
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    ids = tuple((37 * i * i + 11 * i + 5) % vocabulary for i in range(PREFIX + 2 * TAIL))
    prefix, tails = ids[:PREFIX], (ids[PREFIX : PREFIX + TAIL], ids[PREFIX + TAIL :])
    root = Tree(lm).grow([Segment(ROOT, prefix)]).tree
    packed = root.grow([Segment(0, tail, keep=TAIL) for tail in tails]).logits
    worst = 0.0
    for tail, logits in zip(tails, packed, strict=True):
        plain = lm.forward(lm.batch([Encoded(prefix + tail)]))[0, -TAIL:].float()
        span = float(plain.max() - plain.min()) or 1.0
        worst = max(worst, float((logits.float() - plain).abs().max()) / span)
    return worst
