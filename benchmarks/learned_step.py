"""A Learned TV step (forward and backward) over 32 ten-shot prompts that share their demonstrations.

Packed: the prompts' keys and values are there, as they are for every step of a fit but the first; a step replays the
last token and the answer. Plain: the same loss through whole prompts, batched and padded. Weights are frozen on both
sides.
"""

from typing import Any

import torch
from common import arguments, interleaved, load, report
from torch import Tensor

from taskvec.lm import LM
from taskvec.replay import Packed, Plain, Trial, replay
from taskvec.sites import Site
from taskvec.tasks import answer_nll, load_task
from taskvec.vector import Add, Edit, TaskVector

PROMPTS = 32


def measure(lm: LM, rounds: int) -> dict[str, Any]:
    task = load_task("past_tense")
    demos = task.train.demonstrations(seed=0)
    format, examples = task.spec.format, task.train.queries(demos, PROMPTS, seed=0)
    texts = [format.prompt(example.input, demos) for example in examples]
    prompts = [lm.encode(text) for text in texts]
    targets = [lm.answer_ids(t, e.output, format, terminator=True) for t, e in zip(texts, examples, strict=True)]
    theta = torch.zeros(lm.width(Site("resid", 12)), requires_grad=True)
    vector = TaskVector((Edit(Site("resid", 12), Add(theta)),))
    trials = [Trial(i, vector, target[:-1]) for i, target in enumerate(targets)]

    def step(engine: Packed | Plain) -> Tensor:
        theta.grad = None
        for numbers, logits in engine.batches(trials):
            losses = [answer_nll(out, torch.tensor(targets[n])) for n, out in zip(numbers, logits, strict=True)]
            (torch.stack(losses).sum() / PROMPTS).backward()  # type: ignore[no-untyped-call]
        assert theta.grad is not None
        return theta.grad.clone()

    whole, quick = Plain(lm, prompts, rows=8), replay(lm, prompts, keep=True)
    with lm.frozen():
        fast, slow = step(quick), step(whole)
        plain_s, packed_s, _ = interleaved(rounds, lambda: step(whole), lambda: step(quick))
    return {
        "prompts": PROMPTS,
        "mean_prompt_tokens": sum(map(len, prompts)) / PROMPTS,
        "plain_s": plain_s,
        "packed_s": packed_s,
        "ratio": plain_s / packed_s,
        "largest_difference": float((fast - slow).abs().max()),
        "relative_gradient_difference": float((fast - slow).norm() / slow.norm()),
    }


if __name__ == "__main__":
    parsed = arguments(__doc__ or "")
    lm = load(parsed)
    report(parsed, {"benchmark": "learned_step", "threads": parsed.threads, **measure(lm, parsed.rounds)})
