"""`python -m taskvec.theory [--seed N] [--json]`: print the table; exit code 1 when a statement does not hold."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from taskvec.theory import Theorem, theorems

_SIGNS = {"equal": "=", "at most": "<=", "at least": ">="}


def table(rows: Sequence[Theorem]) -> str:
    """One line a statement, in columns."""
    header = ("statement", "predicted", "measured", "tolerance", "holds", "")
    cells = [header, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cells(row: Theorem) -> tuple[str, ...]:
    numbers = f"{_SIGNS[row.relation]} {row.predicted:.4g}", f"{row.measured:.4g}", f"{row.tolerance:.1g}"
    return (row.name, *numbers, "yes" if row.holds else "NO", row.says)


def as_json(rows: Sequence[Theorem]) -> str:
    """One object: {"theorems": [...]}."""
    return json.dumps({"theorems": [asdict(row) | {"holds": row.holds} for row in rows]}, indent=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every statement; 0 if all hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m taskvec.theory", description="Theory in numbers.")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    rows = theorems(options.seed)
    sys.stdout.write((as_json(rows) if options.json else table(rows)) + "\n")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
