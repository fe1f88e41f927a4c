"""Printing: one JSON object, or tables for people. Results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from taskvec.results import Results, table_cells


def emit(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line for people, on standard error."""
    sys.stderr.write(text + "\n")


def say(text: str) -> None:
    """A line on standard output."""
    sys.stdout.write(text + "\n")


def table(cells: Sequence[Sequence[str]]) -> None:
    """A table: drawn on a terminal, aligned text elsewhere."""
    if not sys.stdout.isatty():
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    drawn = Table(*cells[0], box=None, pad_edge=False, header_style="bold")
    for row in cells[1:]:
        drawn.add_row(*row)
    Console().print(drawn)


def results(found: Results) -> None:
    """The table of results and the verdicts."""
    table(table_cells(found))
    for verdict in found.verdicts:
        say("\n" + verdict.sentence)
