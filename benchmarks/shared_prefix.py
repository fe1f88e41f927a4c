"""256 queries behind about 600 demonstration tokens: the shared prefix once, against every whole prompt.

The plain side runs whole prompts at batch 1 (on these cores the fastest way to run them); `--sample` of them are timed
and scaled to all.
"""

from typing import Any

import torch
from common import arguments, interleaved, load, report
from torch import Tensor

from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.tasks import load_task

QUERIES, SHOTS, SAMPLE = 256, 30, 16


def prompts(lm: LM) -> list[Encoded]:
    """Review-like queries (made from the example set's own reviews) behind 30 demonstrations."""
    task = load_task("examples/reviews.jsonl", shots=SHOTS)
    demos = task.train.demonstrations(seed=0)
    queries = [e.input for e in task.test.examples + task.dev.examples + task.train.queries(demos, seed=0)]
    longer = [f"{a} {b}" for a, b in zip(queries, queries[1:] + queries[:1], strict=True)]
    texts = (queries + longer)[:QUERIES]
    return [lm.encode(task.spec.format.prompt(text, demos)) for text in texts]


@torch.no_grad()
def plain(lm: LM, encoded: list[Encoded]) -> Tensor:
    return torch.stack([lm.forward(lm.batch([prompt]), logits_to_keep=1)[0, -1] for prompt in encoded])


def packed(lm: LM, encoded: list[Encoded]) -> Tensor:
    trials = [Trial(i) for i in range(len(encoded))]
    return replay(lm, encoded).answer(trials, Ask(keep=lambda _, logits: logits)).kept


def measure(lm: LM, rounds: int) -> dict[str, Any]:
    encoded = prompts(lm)
    some = encoded[:: len(encoded) // SAMPLE]
    known = packed(lm, encoded)[:: len(encoded) // SAMPLE]
    difference = float((plain(lm, some) - known).abs().max())
    slow, fast, _ = interleaved(rounds, lambda: plain(lm, some), lambda: packed(lm, encoded))
    scale = len(encoded) / len(some)
    shared = min(encoded[0].shared(prompt) for prompt in encoded[1:])
    return {
        "queries": len(encoded),
        "shared_tokens": shared,
        "mean_prompt_tokens": sum(map(len, encoded)) / len(encoded),
        "plain_queries_timed": len(some),
        "plain_s": slow * scale,
        "packed_s": fast,
        "ratio": slow * scale / fast,
        "largest_difference": difference,
    }


if __name__ == "__main__":
    parsed = arguments(__doc__ or "")
    lm = load(parsed)
    report(parsed, {"benchmark": "shared_prefix", "threads": parsed.threads, **measure(lm, parsed.rounds)})
