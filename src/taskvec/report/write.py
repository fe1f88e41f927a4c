"""Writing what a run says beside its cells: results, tables, and the report."""

import json
from pathlib import Path

from taskvec.files import replaced
from taskvec.report.page import page
from taskvec.report.read import Run
from taskvec.report.tables import latex_tables, markdown_tables


def write_report(run: Run) -> list[Path]:
    """Write results.json, results.parquet, tables.md, tables.tex and report.html, each in one step; returns the files.

    Raises `MissingPackage` without plotly or jinja2, when all but the report is there.
    """
    written = write_tables(run)
    return [*written, _written(run.path / "report.html", page(run))]


def write_tables(run: Run) -> list[Path]:
    """The same without report.html."""
    texts = {
        "results.json": json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False) + "\n",
        "tables.md": markdown_tables(run),
        "tables.tex": latex_tables(run),
    }
    written = [_written(run.path / name, text) for name, text in texts.items()]
    with replaced(run.path / "results.parquet") as new:
        run.examples.write_parquet(new)
    return [*written, run.path / "results.parquet"]


def _written(path: Path, text: str) -> Path:
    with replaced(path) as new:
        new.write_text(text, "utf-8")
    return path
