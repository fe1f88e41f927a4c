"""What the benchmarks share: interleaved rounds, medians, and one JSON object."""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from taskvec.lm import LM


def arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    return parsed


def load(parsed: argparse.Namespace) -> LM:
    """The model in float32, its proofs done before anything is timed."""
    from taskvec.hooks import prove
    from taskvec.replay import packs

    lm = LM.load(parsed.model, dtype="float32", device=parsed.device)
    prove(lm)
    assert packs(lm) is None, packs(lm)
    return lm


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def interleaved(rounds: int, plain: Callable[[], Any], fast: Callable[[], Any]) -> tuple[float, float, list[float]]:
    """Median seconds of both, measured in turn, and the ratio of each round."""
    pairs = [(timed(plain)[0], timed(fast)[0]) for _ in range(rounds)]
    slow, quick = (statistics.median(side) for side in zip(*pairs, strict=True))
    return slow, quick, [a / b for a, b in pairs]


def report(parsed: argparse.Namespace, result: dict[str, Any]) -> None:
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if parsed.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:>24}  {value}")
