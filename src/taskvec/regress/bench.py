"""Everything that is measured of learners, kept in a folder that a kill does not spoil: one part a learner and seed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
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

MEASURED = {"length": long_rows, "fidelity": fidelity_rows, "references": reference_rows}
"""Of learners; what takes longest first, so that processes end together."""
TEXT = "text"
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
    _check(learners, seeds, text, jobs)
    out.mkdir(parents=True, exist_ok=True)
    seeds, folder = list(dict.fromkeys(seeds)), out / "parts"
    parts = [Part(what, learner, seed, sizes) for what in MEASURED for learner in learners for seed in seeds]
    work = partial(_kept, folder=folder)
    done = _in_processes(parts, folder, jobs) if jobs > 1 and len(parts) > 1 else map(work, parts)
    measured = list(zip(parts, track(done, "parts", len(parts)), strict=True))
    measured.sort(key=lambda one: (learners.index(one[0].model), seeds.index(one[0].seed)))
    texts = [Part(TEXT, text[0], seed, text[1]) for seed in seeds] if text is not None else []
    measured += [(part, work(part)) for part in track(texts, "numbers as text", len(texts))]
    return [row for _, rows in measured for row in rows]


def _check(learners: Sequence[Learner], seeds: Sequence[int], text: object, jobs: int) -> None:
    if not seeds or min(seeds) < 0 or not (learners or text) or jobs < 1:
        found = f"{len(learners)} learners, seeds {list(seeds)}, {jobs} jobs"
        raise InputError("a learner, a seed of 0 or more, a job", found, "name some")
    names = [learner.settings.name for learner in learners]
    if len(set(names)) < len(names):
        raise InputError("learners of different names", ", ".join(names), "rename one in its configuration")


@dataclass(frozen=True, eq=False)
class Part:
    """What is measured of a model under one seed, with how many of everything."""

    what: str
    model: LM
    seed: int
    sizes: Sizes | TextSizes


def _in_processes(parts: Sequence[Part], folder: Path, jobs: int) -> Iterator[list[RegressRow]]:
    """The parts' rows, in their order. Tiny models gain nothing from a second thread, so each process has one."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker) as pool:
        waiting = [pool.submit(_one_thread, part, folder) for part in parts]
        try:
            yield from (done.result() for done in waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread(part: Part, folder: Path) -> list[RegressRow]:
    torch.set_num_threads(1)
    return _kept(part, folder)


def _kept(part: Part, folder: Path) -> list[RegressRow]:
    """A part's rows: read, or measured and written down in one step."""
    depends = {"what": part.what, "model": part.model.fingerprint, "seed": part.seed, "taskvec": version("taskvec")}
    depends |= {"sizes": asdict(part.sizes)}
    held = folder / f"{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not held.is_file():
        rows = [row.to_dict() for row in _measured(part)]
        plain = {"what": part.what, "name": part.model.id, "seed": part.seed, "rows": rows}
        with replaced(held) as new:
            new.write_text(json.dumps(plain, allow_nan=False) + "\n", "utf-8")
    return [RegressRow.from_dict(row) for row in json.loads(held.read_text("utf-8"))["rows"]]


def _measured(part: Part) -> Iterator[RegressRow]:
    if isinstance(part.sizes, TextSizes):
        for family in TEXT_CLASSES:
            yield from text_rows(part.model, family, seed=part.seed, sizes=part.sizes)
        return
    assert isinstance(part.model, Learner)
    yield from MEASURED[part.what](Bench(part.model, part.seed, part.sizes))
