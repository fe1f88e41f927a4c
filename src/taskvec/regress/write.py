"""Writing what was measured: results.json, tables, pictures, the report."""

import json
from collections.abc import Sequence
from pathlib import Path

from taskvec.errors import MissingPackage
from taskvec.files import replaced
from taskvec.regress.plots import fidelity_picture, length_picture
from taskvec.regress.rows import RegressRow
from taskvec.regress.tables import all_tables, answer, pick
from taskvec.report.pictures import Page, Picture, picture_page
from taskvec.report.tables import markdown

TITLE = "Functional regression"
ABOUT = (
    "Transformers that learn functions in context, and task vectors in them: does a vector carry the function, or "
    "something that helps whatever the function?"
)


def write_results(rows: Sequence[RegressRow], out: Path) -> list[Path]:
    """Write all files, each in one step; returns them. Raises `MissingPackage` without matplotlib or jinja2, when
    results and tables are there."""
    lead, details = answer(rows)
    plain = {"answer": lead, "rows": [row.to_dict() for row in rows]}
    tables = all_tables(rows)
    text = "\n\n".join([f"# {TITLE}", lead, *details, *map(markdown, tables)]) + "\n"
    written = [
        _written(out / "results.json", json.dumps(plain, allow_nan=False) + "\n"),
        _written(out / "tables.md", text),
    ]
    try:
        drawn = pictures(rows)
        page = picture_page(Page(TITLE, ABOUT, lead, details, tuple(drawn), tuple(tables)))
    except MissingPackage as error:
        raise MissingPackage(error.wanted, f"{error.found}; results and tables are in {out}", error.do) from None
    written += [_written(out / f"{picture.name}.svg", picture.svg) for picture in drawn]
    return [*written, _written(out / "report.html", page)]


def pictures(rows: Sequence[RegressRow]) -> list[Picture]:
    """The pictures of every learner."""
    out = list[Picture]()
    for learner in dict.fromkeys(row.learner for row in rows if row.test != "text"):
        some = pick(rows, learner=learner)
        out += [fidelity_picture(some), length_picture(some, yardsticks=False), length_picture(some, yardsticks=True)]
    return out


def _written(path: Path, text: str) -> Path:
    with replaced(path) as new:
        new.write_text(text, "utf-8")
    return path
