"""What an analysis returns: numbers with intervals, one picture, one sentence that says what to see."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from taskvec.files import replaced
from taskvec.report.pictures import Picture
from taskvec.results import Metric

Cells = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Finding:
    """`frame` has one row a measured value: what it is of, then `value`, `low`, `high`."""

    name: str
    picture: Picture
    frame: pl.DataFrame

    def save(self, folder: Path) -> list[Path]:
        """Write the picture and the frame beside it, each in one step."""
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.csv"]
        for path, text in zip(paths, (self.picture.svg, self.frame.write_csv()), strict=True):
            with replaced(path) as new:
                new.write_text(text, "utf-8")
        return paths


def rows(found: Iterable[tuple[Cells, Metric]]) -> pl.DataFrame:
    """A frame of measured values."""
    return pl.DataFrame([{**of, "value": m.value, "low": m.low, "high": m.high} for of, m in found])
