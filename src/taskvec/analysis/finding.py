"""What an analysis returns: numbers with intervals, one picture, one sentence that says what to see."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from taskvec.files import replaced
from taskvec.report.curves import Curve, Panel, as_drawings, as_svg
from taskvec.report.pictures import Picture
from taskvec.report.statistics import over
from taskvec.results import Metric, mean, proportion

Cells = Mapping[str, Any]
Found = list[tuple[Cells, Metric]]
"""Measured values: what each is of, and the value with its interval."""


@dataclass(frozen=True, eq=False)
class Finding:
    """`found` has a row a measured value; `says` is the sentence under the `panels` of its picture."""

    name: str
    title: str
    says: str
    panels: tuple[Panel, ...]
    found: Found

    @cached_property
    def frame(self) -> pl.DataFrame:
        """Columns of what a value is of, then `value`, `low`, `high`."""
        plain = [{**of, "value": m.value, "low": m.low, "high": m.high} for of, m in self.found]
        return pl.DataFrame(plain, infer_schema_length=None)

    @cached_property
    def picture(self) -> Picture:
        """As SVG, and as charts for a page."""
        drawings = as_drawings(self.name, self.says, self.panels)
        return Picture(self.name, self.title, self.says, as_svg(self.panels), tuple(drawings))

    def save(self, folder: Path) -> list[Path]:
        """Write the picture and the frame beside it, each in one step."""
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.csv"]
        for path, text in zip(paths, (self.picture.svg, self.frame.write_csv()), strict=True):
            with replaced(path) as new:
                new.write_text(text, "utf-8")
        return paths


def panel(
    title: str,
    found: Iterable[tuple[Cells, Metric]],
    *,
    by: str,
    x: str = "layer",
    where: Cells | None = None,
    nulls: Sequence[str] = (),
) -> Panel:
    """A curve for each value of `by` among the rows that have all of `where`; `nulls` are dotted."""
    curves: dict[str, list[tuple[int | float, Metric]]] = {}
    for of, metric in found:
        if (where or {}).items() <= of.items():
            curves.setdefault(str(of[by]), []).append((of[x], metric))
    made = (Curve(name, tuple(sorted(some, key=lambda one: one[0])), name in nulls) for name, some in curves.items())
    return Panel(title, x, tuple(made))


def places(
    title: str, found: Iterable[tuple[Cells, Metric]], *, x: str, by: str, where: Cells, nulls: Sequence[str] = ()
) -> Panel:
    """The same over an axis of names."""
    some = [(of, metric) for of, metric in found if where.items() <= of.items()]
    names = list(dict.fromkeys(str(of[x]) for of, _ in some))
    numbered = [({**of, x: names.index(str(of[x]))}, metric) for of, metric in some]
    made = panel(title, numbered, by=by, x=x, nulls=nulls)
    return Panel(made.title, "", made.curves, tuple(names))


def average(values: Tensor | Sequence[float]) -> Metric:
    """The mean of some items, which are not none."""
    found = mean(np.asarray(values, dtype=np.float64))
    assert found is not None
    return found


def share(hits: Tensor) -> Metric:
    """The share of hits among some items, which are not none."""
    found = proportion(np.asarray(hits, dtype=bool))
    assert found is not None
    return found


def jackknifed(whole: float, less: Sequence[float]) -> Metric:
    """A number of a whole, with a 95 % t interval from what it is without each of its parts (delete-one jackknife);
    without an interval where there are not two."""
    parts = len(less)
    if parts < 2:
        return Metric(whole, whole, whole)
    around = over([parts * whole - (parts - 1) * one for one in less])
    return Metric(whole, whole - around.value + around.low, whole - around.value + around.high)


def value(found: Found, **of: Any) -> Metric:
    """The one value of this."""
    (metric,) = (metric for cells, metric in found if of.items() <= cells.items())
    return metric
