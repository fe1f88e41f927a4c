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
PREFIX, TAIL, LONG = 40, 3, 1024
WINDOWS = ("window", "chunk", "local")


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
    return Packed(lm, prompts, starts, budget or Budget.of(lm.config.hidden_size), keep)


def packs(lm: LM) -> str | None:
    """None if the model can be packed, else the reason why not. Proved once: a two-segment packed pass against the
    plain one, behind a prefix of 40 tokens (half of a shorter context), or of more than the model's attention window.
    No model's name is trusted."""
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
    windows = _windows(lm)
    unproved = {name: size for name, size in windows.items() if size > LONG}
    unproved.pop("sliding_window", None)  # that one is transformers' own: the tree's masks know it
    if unproved:
        return f"its attention has a window {unproved} too long to prove anything behind it"
    short = [size for size in windows.values() if size <= LONG]
    prefix = max([_prefix(lm), *(size + 1 for size in short)])
    return _packed_wrong(lm, prefix)


def _prefix(lm: LM) -> int:
    """`PREFIX` tokens, or half of a shorter context."""
    return PREFIX if lm.max_length is None else min(PREFIX, lm.max_length // 2)


def _packed_wrong(lm: LM, prefix: int) -> str | None:
    try:
        error = _packing_error(lm, prefix)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as raised:
        return f"a packed pass failed ({type(raised).__name__}: {str(raised).partition(chr(10))[0]})"
    allowed = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.1
    return None if error <= allowed else f"a packed pass differs from the plain one by {error:.2g} of the logits' range"


def _windows(lm: LM) -> dict[str, int]:
    """What the configuration says of local attention: in its reach, a token sees only so many before it."""
    sizes = {k: v for k, v in lm.config.to_dict().items() if type(v) is int and any(part in k for part in WINDOWS)}
    return {name: size for name, size in sizes.items() if lm.max_length is None or size < lm.max_length}


@torch.no_grad()
def _packing_error(lm: LM, length: int) -> float:
    """The largest difference between packed and plain logits, over the range of the logits.

    The first tail is as long as the short prefix, so that the second stands far from where it belongs in the pass.
    """
    vocabulary = lm.vocabulary
    second = length + _prefix(lm)
    ids = tuple((37 * i * i + 11 * i + 5) % vocabulary for i in range(second + TAIL))
    prefix, tails = ids[:length], (ids[length:second], ids[second:])
    root = Tree(lm).grow([Segment(ROOT, prefix)]).tree
    packed = root.grow([Segment(0, tail, keep=TAIL) for tail in tails]).logits
    worst = 0.0
    for tail, logits in zip(tails, packed, strict=True):
        plain = lm.forward(lm.batch([Encoded(prefix + tail)]), logits_to_keep=TAIL)[0].float()
        span = float(plain.max() - plain.min()) or 1.0
        worst = max(worst, float((logits.float() - plain).abs().max()) / span)
    return worst
