"""One set of the classification suite under one seed, as `taskvec bench` runs it: against each method on whole prompts.

Packed: the group with its shared work, scoring and timing of queries included. Plain: every trial that any method or
score asked for (what was shared is counted once), as whole passes over its prompt: one a trial and one a label of
several tokens; a training step counts twice, forward and backward; further answer tokens are not counted. All of this
favours the plain way. A pass is timed on a fixed sample of those trials, in batches of 8, and scaled by tokens.
"""

import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import arguments, load, report, timed

from taskvec.bench import Grid, RunFolder
from taskvec.bench.grid import bench_methods
from taskvec.bench.run import run_group
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Packed, Trial
from taskvec.tasks.suite import load_suite

SET, SAMPLE = "sst2", 48
Asked = list[tuple[Encoded, int]]


def recording(asked: Asked) -> None:
    """Let every packed engine note (prompt, how many whole passes the plain way would take)."""
    answer, batches = Packed.answer, Packed.batches

    def noted_answer(self: Packed, trials: Sequence[Trial], ask: Ask) -> Any:
        long = sum(len(label) > 1 for label in ask.labels)
        asked.extend((self.prompts[trial.prompt], 1 + long) for trial in trials)
        return answer(self, trials, ask)

    def noted_batches(self: Packed, trials: Sequence[Trial]) -> Any:
        times = 2 if torch.is_grad_enabled() else 1
        asked.extend((self.prompts[trial.prompt], times) for trial in trials)
        return batches(self, trials)

    Packed.answer, Packed.batches = noted_answer, noted_batches  # type: ignore[method-assign]


@torch.no_grad()
def seconds_a_token(lm: LM, asked: Asked) -> float:
    """Of whole passes over a sample, drawn by tokens: most of the plain way's time is long prompts."""
    picked = random.Random(0).choices(asked, [len(prompt) * times for prompt, times in asked], k=SAMPLE)
    prompts = sorted((prompt for prompt, _ in picked), key=len)
    spent = 0.0
    for start in range(0, SAMPLE, 8):
        batch = lm.batch(prompts[start : start + 8])
        spent += timed(partial(lm.forward, batch, logits_to_keep=1))[0]
    return spent / sum(map(len, prompts))


def measure(lm: LM) -> dict[str, Any]:
    suite = load_suite("classification").model_copy(update={"tasks": (SET,)})
    grid = Grid.of(lm, suite, bench_methods(None, {}, suite.queries), [0])
    asked: Asked = []
    recording(asked)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.open(Path(folder) / "run", grid, resume=False)
        packed_s, cells = timed(lambda: list(run_group(lm, grid, run, grid.tasks[0], 0)))
        outcomes = {cell.method: run.outcome(cell) for cell in cells}
    tokens = sum(len(prompt) * times for prompt, times in asked)
    a_token = seconds_a_token(lm, asked)
    return {
        "set": SET,
        "cells": len(cells),
        "plain_passes": sum(times for _, times in asked),
        "plain_tokens": tokens,
        "plain_s_a_token": a_token,
        "plain_s": tokens * a_token,
        "packed_s": packed_s,
        "ratio": tokens * a_token / packed_s,
        "cell_s": {name: outcome.ledger["seconds"] for name, outcome in outcomes.items() if outcome is not None},
    }


if __name__ == "__main__":
    parsed = arguments(__doc__ or "")
    lm = load(parsed)
    report(parsed, {"benchmark": "bench", "threads": parsed.threads, **measure(lm)})
