"""The two prompts everything is compared with: zero-shot and few-shot (Brown et al., arXiv 2005.14165).

**Idea.** Neither edits anything: the bare query, and the query behind the seed's demonstrations.

**Formula.** Each is a task vector without edits, whose origin says which demonstrations stand in the prompt.

**Where we differ.** Few-shot stands twice in a table: whole, and behind a cached prefix, the honest rival in cost.

**Cost.** Nothing to fit.

**When to use it.** They stand in every table without being asked for.
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
    cites: ClassVar[str] = "arXiv 2005.14165"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Nothing to fit. The origin names the demonstrations that few-shot beside it would use; none of them is
        read."""
        train, dev = single(train, dev)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            return TaskVector((), fitting.origin())


@dataclass(frozen=True)
class FewShot:
    """The query behind the seed's demonstrations: in-context learning itself, the reference of d_ntp."""

    name: ClassVar[str] = "few-shot"
    cites: ClassVar[str] = "arXiv 2005.14165"
    sites: ClassVar[tuple[str, ...]] = ()
    ops: ClassVar[tuple[str, ...]] = ()
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> TaskVector:
        """Draw the demonstrations."""
        train, dev = single(train, dev)
        with Fitting.of(lm, self, train, seed=seed) as fitting:
            fitting.show()
            return TaskVector((), fitting.origin(prompt="few-shot"))
