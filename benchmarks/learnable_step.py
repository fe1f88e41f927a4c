"""A Learnable TV step (forward and backward to all head weights) over 32 ten-shot prompts with shuffled labels.

Packed: the prompts' keys and values are there, as they are for every step of a fit but the first; a step replays each
prompt's last token. Plain: the same loss through whole prompts, batched and padded. Weights are frozen on both sides.
"""

from typing import Any

import torch
from common import arguments, interleaved, load, report
from torch import Tensor

from taskvec.evaluate import Lessons
from taskvec.evaluate.drawing import draw, encode_drawn, projected_heads
from taskvec.lm import LM
from taskvec.methods.learnable import added, layer_vectors
from taskvec.replay import Plain
from taskvec.sites import Site
from taskvec.tasks import answer_nll, load_task

PROMPTS = 32


def measure(lm: LM, rounds: int) -> dict[str, Any]:
    task = load_task("past_tense")
    prompts, golds = encode_drawn(lm, task.train, draw(task.train, PROMPTS, seed=0, shuffled=True))
    targets = [gold[:1] for gold in golds]
    width = lm.width(Site("heads", 0, 0))
    means = 0.1 * torch.randn(lm.n_layers, lm.n_heads, width, generator=torch.Generator().manual_seed(0))
    basis = projected_heads(lm, means)
    quick = Lessons.of(lm, prompts, targets, answer_nll)
    whole = Lessons(Plain(lm, prompts, rows=8), targets, quick.loss)

    def step(lessons: Lessons) -> Tensor:
        phi = torch.zeros(lm.n_layers, lm.n_heads, requires_grad=True)
        rows = layer_vectors(phi, basis)
        leaf = rows.detach().requires_grad_()
        lessons.descend([added(leaf)], range(PROMPTS))
        rows.backward(leaf.grad)  # type: ignore[no-untyped-call]
        assert phi.grad is not None
        return phi.grad

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
    report(parsed, {"benchmark": "learnable_step", "threads": parsed.threads, **measure(lm, parsed.rounds)})
