"""Keep of a regression run what the claims page reads: rows without controls, where it needs them, four digits.

Usage: regression_rows.py RESULTS.json OUT.json
"""

import json
import sys
from pathlib import Path

KEPT = ("method", "control", "learner", "function", "test", "examples", "seed", "n", "mse", "fidelity")
TESTS = ("length", "no-examples", "other-examples", "text")


def short(value: object) -> object:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {name: short(part) for name, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(source: Path, out: Path) -> None:
    """Read, keep, write."""
    rows = json.loads(source.read_text("utf-8"))["rows"]
    most = {row["learner"]: max(r["examples"] for r in rows if r["learner"] == row["learner"]) for row in rows}
    kept = [
        {name: short(row[name]) for name in KEPT}
        for row in rows
        if row["test"] in TESTS
        and row["control"] in ("", "yardstick")
        and (row["test"] != "length" or row["examples"] == most[row["learner"]])
    ]
    out.write_text(json.dumps({"rows": kept}) + "\n", "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
