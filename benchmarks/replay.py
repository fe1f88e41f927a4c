"""Every single-head patch of a prompt: one replay against one full hooked pass per head.

Both give the last token's logits under each patch (`replace` one head's output at the last token by a fixed vector).
A plain pass of each head is timed in every round, on a fixed sample of heads where `--sample` is below their number;
its time is then scaled to all heads. The packed side always runs all heads, its prompt included.
"""

import sys
from typing import Any

import torch
from common import arguments, interleaved, load, report
from torch import Tensor

from taskvec.hooks import inject
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.sites import Site
from taskvec.vector import Edit, Replace, TaskVector


def patches(lm: LM) -> list[TaskVector]:
    generator = torch.Generator().manual_seed(0)
    sites = [Site("heads", layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
    return [TaskVector((Edit(site, Replace(torch.randn(lm.width(site), generator=generator))),)) for site in sites]


@torch.no_grad()
def plain(lm: LM, prompt: Encoded, vectors: list[TaskVector]) -> Tensor:
    batch, rows = lm.batch([prompt]), []
    for vector in vectors:
        with inject(lm, vector):
            rows.append(lm.forward(batch, logits_to_keep=1)[0, -1])
    return torch.stack(rows)


def packed(lm: LM, prompt: Encoded, vectors: list[TaskVector]) -> Tensor:
    trials = [Trial(0, vector) for vector in vectors]
    return replay(lm, [prompt]).answer(trials, Ask(keep=lambda _, logits: logits)).kept


def measure(lm: LM, tokens: int, rounds: int, sample: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    prompt = Encoded(tuple(torch.randint(10, 40_000, (tokens,), generator=generator).tolist()))
    vectors = patches(lm)
    some = vectors[:: max(1, len(vectors) // sample)]
    known = packed(lm, prompt, vectors)[:: max(1, len(vectors) // sample)]
    difference = float((plain(lm, prompt, some) - known).abs().max())
    slow, fast, _ = interleaved(rounds, lambda: plain(lm, prompt, some), lambda: packed(lm, prompt, vectors))
    scale = len(vectors) / len(some)
    return {
        "tokens": tokens,
        "patches": len(vectors),
        "plain_patches_timed": len(some),
        "plain_s": slow * scale,
        "packed_s": fast,
        "ratio": slow * scale / fast,
        "largest_difference": difference,
    }


def main() -> None:
    sample = int(sys.argv.pop(sys.argv.index("--sample") + 1)) if "--sample" in sys.argv else 45
    if "--sample" in sys.argv:
        sys.argv.remove("--sample")
    parsed = arguments(__doc__ or "")
    lm = load(parsed)
    short = measure(lm, 96, parsed.rounds, sample)
    long = measure(lm, 400, parsed.rounds, max(1, sample // 3))
    report(parsed, {"benchmark": "replay", "threads": parsed.threads, **short, "at_400_tokens": long})


if __name__ == "__main__":
    main()
