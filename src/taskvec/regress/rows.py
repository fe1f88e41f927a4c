"""What is measured of a learner, row by row."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from taskvec.regress.alignment import Alignment
from taskvec.results import Metric

VANILLA, EXAMPLES, YARDSTICK = "vanilla", "own-examples", "yardstick"
LENGTH = "length"
WRONG, MEAN, SHUFFLED = "wrong-function", "mean-over-functions", "shuffled"


@dataclass(frozen=True)
class RegressRow:
    """One method (or control) at one place. `test` names what is varied; `examples` stand before each query; `mse` is
    against the true value; `variance` is what predicting 0 gives in training; `n` functions (items, of texts). The
    learner was trained on up to `trained` examples. `unparsed` texts were no number, and count as 0."""

    method: str
    control: str
    learner: str
    function: str
    test: str
    examples: int
    seed: int
    n: int
    mse: Metric | None
    fidelity: Metric | None
    variance: float
    trained: int = 0
    alignment: Alignment | None = None
    unparsed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RegressRow":
        """The row of plain values."""
        made = dict(plain)
        for name in ("mse", "fidelity"):
            made[name] = None if made[name] is None else Metric(**made[name])
        made["alignment"] = None if made["alignment"] is None else Alignment(**made["alignment"])
        return cls(**made)
