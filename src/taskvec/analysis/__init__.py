"""How a task vector works inside the model: each analysis one file, a call that returns a `Finding` with its null.

subject = Subject.of(lm, vector, task)
finding = ANALYSES["lens"](subject)     # finding.frame, finding.picture.svg, finding.picture.says
"""

from collections.abc import Callable

from taskvec.analysis.finding import Finding
from taskvec.analysis.lens import lens
from taskvec.analysis.subject import Subject
from taskvec.analysis.sweep import sweep

ANALYSES: dict[str, Callable[[Subject], Finding]] = {"lens": lens, "sweep": sweep}

__all__ = ["ANALYSES", "Finding", "Subject"]
