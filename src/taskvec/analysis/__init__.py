"""How a task vector works inside the model: each analysis one file, a call that returns a `Finding` with its null.

subject = Subject.of(lm, vector, task)
finding = ANALYSES["lens"](subject)     # finding.frame, finding.picture.svg, finding.picture.says
"""

from collections.abc import Callable

from taskvec.analysis.conflict import conflict
from taskvec.analysis.finding import Finding
from taskvec.analysis.geometry import geometry
from taskvec.analysis.heads import heads
from taskvec.analysis.lens import lens
from taskvec.analysis.ov import ov
from taskvec.analysis.propagation import propagation
from taskvec.analysis.rotation import rotation
from taskvec.analysis.subject import Beside, Subject
from taskvec.analysis.sweep import sweep

ANALYSES: dict[str, Callable[[Subject], Finding]] = {
    "lens": lens,
    "ov": ov,
    "heads": heads,
    "propagation": propagation,
    "rotation": rotation,
    "geometry": geometry,
    "conflict": conflict,
    "sweep": sweep,
}

__all__ = ["ANALYSES", "Beside", "Finding", "Subject"]
