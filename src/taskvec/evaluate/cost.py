"""What a query costs: one prompt at a time, from its tokens to its first logits."""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from taskvec.evaluate.observe import Condition
from taskvec.hooks import inject
from taskvec.lm import LM, Encoded
from taskvec.replay import Segment, Tree, packs
from taskvec.replay.tree import ROOT
from taskvec.vector import Adapted, TaskVector, VectorSource

TIMED, LEAST, PATIENCE = 20, 5, 5.0
"""Queries timed: up to 20; long prompts fewer, at least 5, once that many seconds are spent."""


@dataclass(frozen=True)
class QueryCost:
    """Mean tokens of a prompt, mean tokens computed for it, and the median milliseconds of up to 20 queries."""

    prompt_tokens: float
    computed_tokens: float
    query_ms: float


def _enough(times: Sequence[float]) -> bool:
    return len(times) > LEAST and sum(times) > PATIENCE


@torch.no_grad()
def query_cost(lm: LM, prompts: Sequence[Encoded], condition: Condition = None) -> QueryCost:
    """Batch 1, unpacked, without a cached prefix; the edit is in the time (a predictor's own few products are not)."""
    times = list[float]()
    keep = {"logits_to_keep": 1} if "logits_to_keep" in lm.accepts else {}
    with condition.applied(lm) if isinstance(condition, Adapted) else nullcontext():
        for prompt in [prompts[0], *prompts[:TIMED]]:  # the first one warms up
            if _enough(times):
                break
            batch = lm.batch([prompt])
            vectors = condition if isinstance(condition, TaskVector | VectorSource) else [None]
            with inject(lm, vectors):
                start = time.perf_counter()
                lm.forward(batch, **keep)
                times.append(time.perf_counter() - start)
        virtual = getattr(lm.model, "virtual_tokens", 0)
    mean = statistics.fmean(map(len, prompts))
    return QueryCost(mean, mean + virtual, 1000 * statistics.median(times[1:]))


@torch.no_grad()
def cached_query_cost(lm: LM, prompts: Sequence[Encoded]) -> QueryCost | None:
    """The same behind a cached prefix: the tokens all prompts share are computed beforehand and not counted.

    None where the model cannot reuse a prefix that way.
    """
    if packs(lm) is not None:
        return None
    shared = min(min(len(p) for p in prompts) - 1, *(prompts[0].shared(p) for p in prompts))
    tree, parent = Tree(lm), ROOT
    if shared:
        tree, parent = tree.grow([Segment(ROOT, prompts[0].tokens(0, shared))]).tree, 0
    times = list[float]()
    for prompt in [prompts[0], *prompts[:TIMED]]:
        if _enough(times):
            break
        segment = Segment(parent, prompt.tokens(shared, len(prompt)), keep=1)
        start = time.perf_counter()
        tree.grow([segment])
        times.append(time.perf_counter() - start)
    mean = statistics.fmean(map(len, prompts))
    return QueryCost(mean, mean - shared, 1000 * statistics.median(times[1:]))
