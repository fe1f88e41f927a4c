"""Writing what a run says beside its cells: results, tables, and the report."""

import json
import os
from pathlib import Path

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
    new = run.path / ".new.results.parquet"
    run.examples.write_parquet(new)
    os.replace(new, run.path / "results.parquet")
    return [*written, run.path / "results.parquet"]


def _written(path: Path, text: str) -> Path:
    new = path.with_name(f".new.{path.name}")
    new.write_text(text, "utf-8")
    os.replace(new, path)
    return path
