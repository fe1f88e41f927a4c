"""Writing what a run says beside its cells: results, tables, and the report."""

import json
from pathlib import Path

from taskvec.report.read import Run
from taskvec.report.tables import latex_tables, markdown_tables


def write_report(run: Run) -> list[Path]:
    """Write results.json, results.parquet, tables.md, tables.tex; returns the files."""
    texts = {
        "results.json": json.dumps(run.to_dict(), ensure_ascii=False, allow_nan=False) + "\n",
        "tables.md": markdown_tables(run),
        "tables.tex": latex_tables(run),
    }
    for name, text in texts.items():
        (run.path / name).write_text(text, "utf-8")
    run.examples.write_parquet(run.path / "results.parquet")
    return [run.path / name for name in (*texts, "results.parquet")]
