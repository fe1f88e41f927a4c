"""Everything that is measured of learners, kept in a folder that a kill does not spoil: one part a learner and seed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

from taskvec.bench.run import begin_worker
from taskvec.errors import InputError
from taskvec.files import replaced
from taskvec.lm import LM
from taskvec.progress import track
from taskvec.regress.experiments import fidelity_rows, long_rows, reference_rows
from taskvec.regress.functions import FunctionClass
from taskvec.regress.learner import Learner
from taskvec.regress.measure import Bench, Sizes
from taskvec.regress.rows import RegressRow
from taskvec.regress.text import TextSizes, text_rows

TEXT_CLASSES = (FunctionClass("linear", 6), FunctionClass("relu", 6))
"""The functions that language models are asked for (the linear task vector paper's)."""


def regress_bench(
    learners: Sequence[Learner],
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    sizes: Sizes = Sizes(),  # noqa: B008 -- frozen
    text: tuple[LM, TextSizes] | None = None,
    jobs: int = 1,
) -> list[RegressRow]:
    """Measure learners, in `jobs` processes of one thread each, and `text`: a language model on numbers as text.
    What the folder holds of the same learners, sizes and version is not measured again. Raises `InputError` for no
    learners, seeds or jobs, and for two learners of one name."""
    if not seeds or min(seeds) < 0 or not (learners or text) or jobs < 1:
        found = f"{len(learners)} learners, seeds {list(seeds)}, {jobs} jobs"
        raise InputError("a learner, a seed of 0 or more, a job", found, "name some")
    names = [learner.settings.name for learner in learners]
    if len(set(names)) < len(names):
        raise InputError("learners of different names", ", ".join(names), "rename one in its configuration")
    out.mkdir(parents=True, exist_ok=True)
    parts = [(learner, seed, out / "parts", sizes) for learner in learners for seed in dict.fromkeys(seeds)]
    texts = [(text[0], seed, out / "parts", text[1]) for seed in dict.fromkeys(seeds) if text is not None]
    done = _in_processes(parts, jobs) if jobs > 1 and len(parts) > 1 else (_kept(*part) for part in parts)
    rows = [row for some in track(done, "learners and seeds", len(parts)) for row in some]
    return rows + [row for part in track(texts, "numbers as text", len(texts)) for row in _kept(*part)]


Part = tuple[LM, int, Path, Sizes | TextSizes]
"""A model, a seed, where rows are kept, how many of everything."""


def _in_processes(parts: Sequence[Part], jobs: int) -> Iterator[list[RegressRow]]:
    """The parts' rows, in their order. Tiny models gain nothing from a second thread, so each process has one."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker) as pool:
        waiting = [pool.submit(_one_thread, part) for part in parts]
        try:
            yield from (done.result() for done in waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread(part: Part) -> list[RegressRow]:
    torch.set_num_threads(1)
    return _kept(*part)


def _kept(one: LM, seed: int, folder: Path, sizes: Sizes | TextSizes) -> list[RegressRow]:
    """The rows of one model under one seed: read, or measured and written down in one step."""
    depends = {"model": one.fingerprint, "seed": seed, "taskvec": version("taskvec")}
    depends |= {"sizes": asdict(sizes)}
    held = folder / f"{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not held.is_file():
        plain = {"name": one.id, "seed": seed, "rows": [row.to_dict() for row in _measured(one, seed, sizes)]}
        with replaced(held) as new:
            new.write_text(json.dumps(plain, allow_nan=False) + "\n", "utf-8")
    return [RegressRow.from_dict(row) for row in json.loads(held.read_text("utf-8"))["rows"]]


def _measured(one: LM, seed: int, sizes: Sizes | TextSizes) -> Iterator[RegressRow]:
    if isinstance(sizes, TextSizes):
        for family in TEXT_CLASSES:
            yield from text_rows(one, family, seed=seed, sizes=sizes)
        return
    assert isinstance(one, Learner)
    bench = Bench(one, seed, sizes)
    yield from reference_rows(bench)
    yield from long_rows(bench)
    yield from fidelity_rows(bench)
