"""Writing what a run says beside its cells: results, tables, and the report."""

import json
from pathlib import Path

from taskvec.report.page import page
from taskvec.report.read import Run
from taskvec.report.tables import latex_tables, markdown_tables


def write_report(run: Run) -> list[Path]:
    """Write results.json, results.parquet, tables.md, tables.tex and report.html; returns the files.

    Raises `MissingPackage` without plotly or jinja2, when all but the report is there.
    """
    texts = {
        "results.json": json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False) + "\n",
        "tables.md": markdown_tables(run),
        "tables.tex": latex_tables(run),
    }
    for name, text in texts.items():
        (run.path / name).write_text(text, "utf-8")
    run.examples.write_parquet(run.path / "results.parquet")
    (run.path / "report.html").write_text(page(run), "utf-8")
    return [run.path / name for name in (*texts, "results.parquet", "report.html")]
