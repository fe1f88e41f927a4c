"""Everything that is measured of learners, kept in a folder that a kill does not spoil: one part a learner and seed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

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
    lm: LM | None = None,
    text: TextSizes = TextSizes(),  # noqa: B008 -- frozen
) -> list[RegressRow]:
    """Measure learners, and a language model on numbers as text (None: not). What the folder holds of the same
    learners, sizes and version is not measured again. Raises `InputError` for no learners or seeds."""
    if not seeds or min(seeds) < 0 or not (learners or lm):
        raise InputError("a learner and a seed of 0 or more", f"seeds {list(seeds)}", "name some")
    names = [learner.settings.name for learner in learners]
    if len(set(names)) < len(names):
        raise InputError("learners of different names", ", ".join(names), "rename one in its configuration")
    out.mkdir(parents=True, exist_ok=True)
    asked = [(one, seed) for one in (*learners, *([lm] if lm else [])) for seed in dict.fromkeys(seeds)]
    rows = list[RegressRow]()
    for one, seed in track(asked, "regression", len(asked)):
        rows += _kept(one, seed, out / "parts", sizes, text)
    return rows


def _kept(one: LM, seed: int, folder: Path, sizes: Sizes, text: TextSizes) -> list[RegressRow]:
    """The rows of one model under one seed: read, or measured and written down in one step."""
    depends = {"model": one.fingerprint, "seed": seed, "taskvec": version("taskvec")}
    depends |= {"sizes": asdict(sizes if isinstance(one, Learner) else text)}
    held = folder / f"{hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not held.is_file():
        plain = {"name": one.id, "seed": seed, "rows": [row.to_dict() for row in _measured(one, seed, sizes, text)]}
        with replaced(held) as new:
            new.write_text(json.dumps(plain, allow_nan=False) + "\n", "utf-8")
    return [RegressRow.from_dict(row) for row in json.loads(held.read_text("utf-8"))["rows"]]


def _measured(one: LM, seed: int, sizes: Sizes, text: TextSizes) -> Iterator[RegressRow]:
    if not isinstance(one, Learner):
        for family in TEXT_CLASSES:
            yield from text_rows(one, family, seed=seed, sizes=text)
        return
    bench = Bench(one, seed, sizes)
    yield from reference_rows(bench)
    yield from long_rows(bench)
    yield from fidelity_rows(bench)
