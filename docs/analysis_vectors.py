"""The vectors of the analysis page: learned ones of each task, an early layer under two seeds and a late one under one.
Those that are there are left alone. Usage: python docs/analysis_vectors.py MODEL DEVICE FOLDER TASK ..."""

import sys
from pathlib import Path

from taskvec.lm import LM
from taskvec.methods.learned import LearnedTaskVector
from taskvec.tasks import load_task


def main(model: str, device: str, folder: Path, tasks: list[str]) -> None:
    """Fit and save what is missing."""
    lm = LM.load(model, device=device)
    early, late = lm.n_layers // 3, 4 * lm.n_layers // 5
    for task in map(load_task, tasks):
        for name, layer, seed in (("early-0", early, 0), ("early-1", early, 1), ("late-0", late, 0)):
            path = folder / f"{task.name}-{name}"
            if not path.exists():
                LearnedTaskVector(layer=layer).fit(lm, task.train, task.dev, seed=seed).save_pretrained(path)
                sys.stderr.write(f"{path.name}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
