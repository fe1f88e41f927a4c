"""bench: a grid of methods x tasks x seeds on one model, cell by cell into a folder that outlives a kill."""

from taskvec.bench.folder import RunFolder
from taskvec.bench.grid import Cell, Grid
from taskvec.bench.run import run_bench

__all__ = ["Cell", "Grid", "RunFolder", "run_bench"]
