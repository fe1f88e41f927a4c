"""One learner, one seed: methods fitted on some functions, and tried with their controls on the prompts of others.

Shapes: F functions, P prompts of each, d width of the last states.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.regress.alignment import Alignment, alignment
from taskvec.regress.fidelity import fidelity
from taskvec.regress.functions import FunctionClass, Functions
from taskvec.regress.ground import Place, Prompts, Support, seed_of, shifted
from taskvec.regress.learner import Learner
from taskvec.regress.rows import EXAMPLES, MEAN, SHUFFLED, VANILLA, WRONG, RegressRow
from taskvec.regress.trained import ConstantVectors, LearnableVectors, LearnedVectors, Training
from taskvec.regress.writers import (
    Asked,
    FunctionVectors,
    InContextVectors,
    LinearVectors,
    Writer,
    ask,
)
from taskvec.results import Metric, mean
from taskvec.vector import Add, TaskVector

OTHERS = 4
"""Other functions whose vectors are tried on each."""
Vectors = Sequence[TaskVector | None]


@dataclass(frozen=True)
class Sizes:
    """How many functions teach, choose and test; prompts of each that methods see, and those they are tested on; and
    the steps of trained methods."""

    teach: int = 64
    look: int = 32
    test: int = 64
    clean: int = 8
    placed: int = 32
    queries: int = 8
    steps: int = 200


def writers(steps: int = Sizes.steps) -> tuple[Writer, ...]:
    """The methods of the benchmark, and the constant that stands beside them."""
    training = Training(lr=0.02, steps=steps)
    return (
        FunctionVectors(),
        InContextVectors(),
        LearnableVectors(training=training),
        LearnableVectors("learnable-released", "released-regression", training),
        LearnedVectors(steps=steps // 2),
        LinearVectors(),
        ConstantVectors(training),
    )


@dataclass(frozen=True, eq=False)
class Bench:
    """A learner under a seed: the functions that teach, choose and test are different ones."""

    learner: Learner
    seed: int
    sizes: Sizes = Sizes()

    def functions(self, what: str, count: int, family: FunctionClass | None = None) -> Functions:
        """New functions for one use."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, f"functions {what}"))
        return (family or self.learner.settings.family).draw(count, generator)

    def support(self, what: str, functions: Functions, place: Place) -> Support:
        """What methods see of these functions."""
        sizes, seed = self.sizes, seed_of(self.seed, f"support {what}")
        return Support.draw(self.learner, functions, place, clean=sizes.clean, placed=sizes.placed, seed=seed)

    def fitted(self, place: Place) -> "Iterator[tuple[Writer, Fitted]]":
        """Each method, fitted for queries that stand at a place."""
        teach, look = (
            self.support(what, self.functions(what, count), place)
            for what, count in (("teach", self.sizes.teach), ("look", self.sizes.look))
        )
        for writer in writers(self.sizes.steps):
            yield writer, Fitted(self, writer, place, teach, look)

    def row(
        self,
        method: str,
        control: str,
        at: tuple[str, int],
        wrong: Float[Tensor, " F"],
        found: tuple[Metric | None, Alignment | None] = (None, None),
    ) -> RegressRow:
        """A row of errors by function, at (test, examples); `found` is its fidelity and its alignment."""
        settings = self.learner.settings
        return RegressRow(
            method=method,
            control=control,
            learner=settings.name,
            function=settings.function,
            test=at[0],
            examples=at[1],
            seed=self.seed,
            n=len(wrong),
            mse=mean(wrong.double().numpy()),
            fidelity=found[0],
            variance=settings.family.variance,
            alignment=found[1],
        )

    @property
    def trained(self) -> int:
        """The most examples it saw in training."""
        return self.learner.settings.points - 1

    @property
    def lengths(self) -> list[int]:
        """Numbers of examples: up to the trained one, and as far beyond as positions reach."""
        k, most = self.trained, self.learner.settings.positions - 1
        return sorted({n for n in (k // 2, k - 1, k, k + 1, 3 * k // 2, 2 * k, 3 * k, most) if n <= most})


@dataclass(frozen=True, eq=False)
class Tried:
    """A method or a control: the vectors on their own functions, and on others (none where there is no task)."""

    own: Vectors
    others: tuple[Vectors, ...] = ()


class Fitted:
    """A method fitted on the class, and its vectors for given functions, with the controls."""

    def __init__(self, bench: Bench, writer: Writer, place: Place, teach: Support, look: Support) -> None:
        self.bench, self.name = bench, writer.name
        self.write = writer.fit(bench.learner, teach, look, seed=bench.seed)

    def tried(self, support: Support) -> dict[str, Tried]:
        """By the control's name ("": the method itself)."""
        own = self.write(support)
        if self.name == ConstantVectors.name:
            return {"": Tried(own)}
        out = {"": _on_others(own)}
        out[SHUFFLED] = _on_others(self.write(support.permuted(seed=self.bench.seed)))
        if all(isinstance(edit.op, Add) for edit in own[0].edits):
            middle = [TaskVector.mean(own[:f] + own[f + 1 :]) for f in range(len(own))]
            out[MEAN] = Tried(middle)
        return out


def _on_others(own: Vectors) -> Tried:
    others = range(1, min(OTHERS, len(own) - 1) + 1)
    return Tried(own, tuple([own[i] for i in shifted(len(own), by)] for by in others))


@dataclass(frozen=True, eq=False)
class Test:
    """Test prompts of one place, and the same queries behind as many own examples as the model was trained on."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    name: str
    place: Place
    prompts: Prompts
    best: Prompts
    bench: Bench

    @cached_property
    def behind(self) -> Asked:
        """The model as it is, at its best length."""
        return ask(self.best, [[None] * self.best.count], states=True)

    @cached_property
    def examples(self) -> Float[Tensor, " F"]:
        """The error that the examples leave."""
        return self.wrong(self.behind.predictions, self.best)[0]

    def wrong(self, predictions: Float[Tensor, "C F P"], prompts: Prompts) -> Float[Tensor, "C F"]:
        """Each function's mean squared error."""
        return (predictions - prompts.values).square().mean(2)

    def bare(self) -> list[RegressRow]:
        """The model as it is, at this place; and behind its own examples."""
        found = ask(self.prompts, [[None] * self.prompts.count], states=True)
        rows = [self.row(VANILLA, "", self.wrong(found.predictions, self.prompts)[0], None, self.aligned(found))]
        if self.place != Place(self.bench.trained):
            rows.append(replace(self.row(EXAMPLES, "", self.examples), examples=self.bench.trained))
        return rows

    def rows(self, method: str, tried: Mapping[str, Tried]) -> list[RegressRow]:
        """A method and its controls."""
        out = list[RegressRow]()
        for control, one in tried.items():
            found = ask(self.prompts, [one.own, *one.others], states=self.compares)
            own, *others = self.wrong(found.predictions, self.prompts)
            against = torch.stack(others).mean(0) if others else own
            score = fidelity(own, against, self.examples, self.bench.learner.settings.family.variance)
            out.append(self.row(method, control, own, score, self.aligned(found)))
            if not control and others:
                out.append(self.row(method, WRONG, against))
        return out

    @property
    def compares(self) -> bool:
        """Are there last states to compare with those at the best length? Not below it, nor under shifts."""
        return self.name == "length" and self.place.examples > self.bench.trained

    def aligned(self, found: Asked) -> Alignment | None:
        """How far the first candidate's last states are from those at the best length."""
        return alignment(found.states[0], self.behind.states[0]) if self.compares else None

    def row(
        self,
        method: str,
        control: str,
        wrong: Float[Tensor, " F"],
        score: Metric | None = None,
        aligned: Alignment | None = None,
    ) -> RegressRow:
        """One row."""
        return self.bench.row(method, control, (self.name, self.place.examples), wrong, (score, aligned))


def draw_test(bench: Bench, name: str, functions: Functions, place: Place) -> Test:
    """Test prompts: the same points at every place of one length."""
    sizes, learner = bench.sizes, bench.learner

    def drawn(where: Place) -> Prompts:
        return Prompts.draw(learner, functions, sizes.queries, where, seed=bench.seed, what="test")

    prompts = drawn(place)
    return Test(name, place, prompts, drawn(Place(bench.trained)).asked(prompts), bench)
