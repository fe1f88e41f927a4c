"""The function vector's exact head sweep: 25 ten-shot prompts with shuffled labels, every head patched by its mean.

One replay of all prompts and heads against one full hooked pass per prompt and head. A plain pass is timed on a fixed
sample of (prompt, head) pairs in every round and scaled to all of them; the replay always does all of them, prompts
included. `--save FILE` writes the prompts and patches that `peers.py` runs in other libraries.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import arguments, interleaved, load, report
from torch import Tensor

from taskvec.evaluate.drawing import draw, encode_drawn
from taskvec.hooks import inject
from taskvec.lm import LM, Encoded
from taskvec.methods.function_vector import indirect_effects
from taskvec.sites import Site
from taskvec.tasks import load_task
from taskvec.vector import Edit, Replace, TaskVector

PROMPTS, SAMPLE = 25, 45


@torch.no_grad()
def plain(lm: LM, pairs: list[tuple[Encoded, int, TaskVector]], clean: list[Tensor]) -> Tensor:
    """p(gold) under each patch minus p(gold) without, one whole pass a pair."""
    rows = []
    for prompt, gold, patch in pairs:
        with inject(lm, patch):
            rows.append(lm.forward(lm.batch([prompt]), logits_to_keep=1)[0, -1].softmax(-1)[gold])
    return torch.stack(rows) - torch.stack(clean)


def measure(lm: LM, rounds: int, save: str | None) -> dict[str, Any]:
    task = load_task("past_tense")
    drawn = draw(task.train, PROMPTS, seed=0, shuffled=True)
    prompts, answers = encode_drawn(lm, task.train, drawn)
    golds = [answer[0] for answer in answers]
    heads = [(layer, head) for layer in range(lm.n_layers) for head in range(lm.n_heads)]
    width = lm.width(Site("heads", 0, 0))
    means = 0.1 * torch.randn(lm.n_layers, lm.n_heads, width, generator=torch.Generator().manual_seed(0))
    everything = [(i, head) for i in range(PROMPTS) for head in heads]
    picked = everything[:: len(everything) // SAMPLE][:SAMPLE]
    pairs = [
        (prompts[i], golds[i], TaskVector((Edit(Site("heads", *head), Replace(means[head])),))) for i, head in picked
    ]
    with torch.no_grad():
        bare = [
            lm.forward(lm.batch([p]), logits_to_keep=1)[0, -1].softmax(-1)[g]
            for p, g in zip(prompts, golds, strict=True)
        ]
    clean = [bare[i] for i, _ in picked]

    def quick() -> Tensor:
        return indirect_effects(lm, prompts, golds, means, heads)

    effects = quick()
    known = torch.stack([effects[i, heads.index(head)] for i, head in picked])
    difference = float((plain(lm, pairs, clean) - known).abs().max())
    if save is not None:
        patches = [{"ids": prompts[i].ids, "gold": golds[i], "head": head} for i, head in picked]
        Path(save).write_text(json.dumps({"means": means.tolist(), "patches": patches, "effects": known.tolist()}))
    slow, fast, _ = interleaved(rounds, lambda: plain(lm, pairs, clean), quick)
    scale = len(everything) / len(picked)
    return {
        "prompts": PROMPTS,
        "mean_prompt_tokens": sum(map(len, prompts)) / PROMPTS,
        "patches": len(everything),
        "plain_patches_timed": len(picked),
        "plain_s": slow * scale,
        "plain_s_a_patch": slow / len(picked),
        "packed_s": fast,
        "ratio": slow * scale / fast,
        "largest_difference": difference,
    }


def main() -> None:
    save = sys.argv.pop(sys.argv.index("--save") + 1) if "--save" in sys.argv else None
    if save is not None:
        sys.argv.remove("--save")
    parsed = arguments(__doc__ or "")
    lm = load(parsed)
    result = measure(lm, parsed.rounds, save)
    report(parsed, {"benchmark": "function_vector", "threads": parsed.threads, **result})


if __name__ == "__main__":
    main()
