"""report: what a benchmark run says, in words, tables and figures. It reads a run's folder and needs no torch."""

from taskvec.report.read import Run, read_run
from taskvec.report.write import write_report

__all__ = ["Run", "read_run", "write_report"]
