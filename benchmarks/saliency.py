"""Saliency of all heads, from one backward pass by replay, against exact ablation of every head and against plain
forward passes over the same prompts: 40 bare prompts under a vector in the middle of the model."""

from typing import Any

import torch
from common import arguments, interleaved, load, report, timed

from taskvec.analysis import Subject
from taskvec.analysis.heads import ablated, salience
from taskvec.lm import LM
from taskvec.sites import Site
from taskvec.tasks import load_task
from taskvec.vector import Add, Edit, TaskVector


def measure(lm: LM, rounds: int) -> dict[str, Any]:
    layer, d = lm.n_layers // 2, lm.width(Site("resid", 0))
    row = torch.randn(d, generator=torch.Generator().manual_seed(0))
    subject = Subject.of(lm, TaskVector((Edit(Site("resid", layer), Add(row)),)), load_task("past_tense"), n=40)
    every = [(at, head) for at in range(lm.n_layers) for head in range(lm.n_heads)]
    batch = lm.batch(subject.bare)

    @torch.no_grad()
    def forward() -> None:
        lm.forward(batch, logits_to_keep=1)

    slow, fast, ratios = interleaved(rounds, lambda: ablated(subject, every), lambda: salience(subject))
    passes = sorted(timed(forward)[0] for _ in range(2 * rounds + 1))[rounds]
    return {
        "prompts": len(subject.bare),
        "heads": len(every),
        "plain_s": slow,
        "packed_s": fast,
        "ratio": slow / fast,
        "ratio_range": [min(ratios), max(ratios)],
        "forward_s": passes,
        "forward_passes": fast / passes,
    }


if __name__ == "__main__":
    parsed = arguments(__doc__ or "")
    result = measure(load(parsed), parsed.rounds)
    report(parsed, {"benchmark": "saliency", "threads": parsed.threads, **result})
