"""Training an adaptive vector with a frozen generator, and what a query costs beside the bare prompt.

The suite `adaptive`'s ten seen tasks, 60 rows each, 10 epochs, no early stop. A query is timed as the bare pass, as the
pass inside `inject` (generator, expansion, edits and pass), and as two bare passes, which it should not exceed by much:
the generator is the model itself.
"""

import resource
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, load, report, timed

from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.adaptive import AdaptiveTaskVector
from taskvec.tasks.suite import load_suite

QUERIES = 10


def measure(lm: LM, times: int) -> dict[str, Any]:
    suite = load_suite("adaptive")
    tasks = suite.load()[: len(suite.tasks)]
    method = AdaptiveTaskVector(patience=10)
    fit_s, source = timed(lambda: method.fit(lm, [t.train for t in tasks], [t.dev for t in tasks], seed=0))
    prompts = [task.spec.format.prompt(task.test.examples[0].input) for task in tasks][:QUERIES]
    batches = [lm.batch([prompt]) for prompt in prompts]

    @torch.no_grad()
    def bare() -> None:
        for batch in batches:
            lm.forward(batch, logits_to_keep=1)

    @torch.no_grad()
    def injected() -> None:
        with inject(lm, source):
            for batch in batches:
                lm.forward(batch, logits_to_keep=1)

    def twice() -> None:
        bare()
        bare()

    sides: dict[str, Callable[[], Any]] = {"bare": bare, "injected": injected, "twice": twice}
    rounds = [{name: timed(work)[0] for name, work in sides.items()} for _ in range(times)]
    seconds = {name: statistics.median(one[name] for one in rounds) for name in sides}
    return {
        "tasks": len(tasks),
        "rows": method.rows * len(tasks),
        "epochs": source.origin.found["epochs"],
        "fit_s": fit_s,
        "fit_tokens": source.origin.cost.tokens,
        "query_ms": {name: 1000 * value / len(batches) for name, value in seconds.items()},
        "over_two_passes": seconds["injected"] / seconds["twice"],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


if __name__ == "__main__":
    parsed = arguments(__doc__ or "")
    report(parsed, {"benchmark": "adaptive", "threads": parsed.threads, **measure(load(parsed), parsed.rounds)})
