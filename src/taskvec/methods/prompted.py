"""The two prompts everything is compared with: zero-shot and few-shot (Brown et al., arXiv 2005.14165).

Neither edits anything. Each is a task vector without edits, whose origin says which demonstrations stand in the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from taskvec.evaluate import Fitting, single
from taskvec.lm import LM
from taskvec.tasks import Dev, Train
from taskvec.vector import TaskVector


@dataclass(frozen=True)
class ZeroShot:
    """The bare query."""

    name: ClassVar[str] = "zero-shot"

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Nothing to fit. The origin names the demonstrations that few-shot beside it would use; none of them is
        read."""
        train, dev = single(train, dev)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            fitting.labels = 0
            return TaskVector((), fitting.origin())


@dataclass(frozen=True)
class FewShot:
    """The query behind the seed's demonstrations: in-context learning itself, the reference of d_ntp."""

    name: ClassVar[str] = "few-shot"

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Draw the demonstrations."""
        train, dev = single(train, dev)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            return TaskVector((), fitting.origin(prompt="few-shot"))
