"""Everything that is measured of learners, kept in a folder that a kill does not spoil: one part a learner and seed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Part:
    """One learner or language model under one seed, and the hash of all its rows depend on."""

    name: str
    seed: int
    key: str


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
    out.mkdir(parents=True, exist_ok=True)
    parts = [
        (_part(one, seed, sizes if isinstance(one, Learner) else text), one)
        for one in (*learners, lm)
        if one
        for seed in dict.fromkeys(seeds)
    ]
    rows = list[RegressRow]()
    for part, one in track(parts, "regression", len(parts)):
        held = out / "parts" / f"{part.key}.json"
        if not held.is_file():
            made = list(_measured(one, part.seed, sizes, text))
            with replaced(held) as new:
                plain = {"name": part.name, "seed": part.seed, "rows": [row.to_dict() for row in made]}
                new.write_text(json.dumps(plain, allow_nan=False) + "\n", "utf-8")
        rows += [RegressRow.from_dict(row) for row in json.loads(held.read_text("utf-8"))["rows"]]
    return rows


def _measured(one: LM, seed: int, sizes: Sizes, text: TextSizes) -> Iterator[RegressRow]:
    if not isinstance(one, Learner):
        for family in TEXT_CLASSES:
            yield from text_rows(one, family, seed=seed, sizes=text)
        return
    bench = Bench(one, seed, sizes)
    yield from reference_rows(bench)
    yield from long_rows(bench)
    yield from fidelity_rows(bench)


def _part(one: LM, seed: int, sizes: Any) -> Part:
    depends = {"model": one.fingerprint, "seed": seed, "sizes": asdict(sizes), "taskvec": version("taskvec")}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    return Part(one.id, seed, key)
