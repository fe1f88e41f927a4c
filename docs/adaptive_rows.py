"""Keep of an adaptive run what the claims page reads: accuracies of every row, and which tasks are unseen.

Usage: adaptive_rows.py RUN OUT.json
"""

import json
import sys
from pathlib import Path

import yaml

KEPT = ("method", "task", "seed", "n", "source", "matched", "accuracy", "label_accuracy", "d_ntp")


def main(run: Path, out: Path) -> None:
    """Read, keep, write."""
    rows = json.loads((run / "results.json").read_text("utf-8"))["rows"]
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    kept = [{name: row[name] for name in KEPT} for row in rows]
    unseen = [name for name, task in config["tasks"].items() if task["unseen"]]
    out.write_text(json.dumps({"unseen": unseen, "rows": kept}) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
