"""One learner, one seed: methods fitted on some functions, and tried with their controls on the prompts of others.

Shapes: F functions, P prompts of each, d width of the last states.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.regress.alignment import alignment
from taskvec.regress.fidelity import fidelity
from taskvec.regress.functions import FunctionClass, Functions, generator_of, seed_of
from taskvec.regress.ground import Place, Prompts, Support, owners, shifted
from taskvec.regress.learner import Learner
from taskvec.regress.rows import EXAMPLES, LENGTH, MEAN, SHUFFLED, VANILLA, WRONG, YARDSTICK, RegressRow
from taskvec.regress.trained import ConstantVectors, LearnableVectors, LearnedVectors, Training
from taskvec.regress.writers import (
    Asked,
    FunctionVectors,
    InContextVectors,
    LinearVectors,
    Writer,
    ask,
)
from taskvec.results import mean
from taskvec.vector import TaskVector

OTHERS = 2
"""Other functions whose vectors are tried on each."""
Vectors = Sequence[TaskVector | None]
Supports = Mapping[str, Support]
"""What vectors are made of, by the control's name."""


@dataclass(frozen=True)
class Sizes:
    """How many functions teach, choose and test; prompts of each that methods see, and those they are tested on; and
    the steps of trained methods."""

    teach: int = 48
    look: int = 16
    test: int = 48
    clean: int = 8
    placed: int = 32
    queries: int = 4
    steps: int = 100

    def __post_init__(self) -> None:
        least = {"teach": 1, "look": 1, "test": OTHERS + 1, "clean": 1, "placed": 2, "queries": 1, "steps": 2}
        for name, size in least.items():
            if getattr(self, name) < size:
                raise InputError(f"{name} of at least {size}", str(getattr(self, name)), "raise it")


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
        generator = generator_of(self.seed, f"functions {what}")
        return (family or self.learner.settings.family).draw(count, generator)

    def support(self, what: str, functions: Functions, place: Place) -> Support:
        """What methods see of these functions."""
        sizes, seed = self.sizes, seed_of(self.seed, f"support {what}")
        return Support.draw(self.learner, functions, place, clean=sizes.clean, placed=sizes.placed, seed=seed)

    def supports(self, what: str, functions: Functions, place: Place) -> Supports:
        """Of functions that are tested, with those of the controls."""
        own = self.support(what, functions, place)
        return {"": own, MEAN: own.pooled(), SHUFFLED: own.permuted(seed=self.seed)}

    def fitted(self, place: Place) -> "Iterator[tuple[Writer, Fitted]]":
        """Each method, fitted for queries that stand at a place."""
        teach, look = (
            self.support(what, self.functions(what, count), place)
            for what, count in (("teach", self.sizes.teach), ("look", self.sizes.look))
        )
        for writer in writers(self.sizes.steps):
            yield writer, Fitted(self, writer, place, teach, look)

    @property
    def trained(self) -> int:
        """The most examples it saw in training."""
        return self.learner.settings.points - 1

    @property
    def beyond(self) -> int:
        """Twice as many, where methods for more examples are fitted. Raises `InputError` where positions end before."""
        if 2 * self.trained > self.learner.settings.positions - 1:
            found = f"{self.learner.settings.positions} positions of {self.learner.id}"
            fix = "train it with more positions"
            raise InputError(f"positions for {2 * self.trained} examples and a query", found, fix)
        return 2 * self.trained

    @property
    def lengths(self) -> list[int]:
        """Numbers of examples: around the dimension, up to the trained one, and as far beyond as positions reach."""
        d, k, most = self.learner.settings.d, self.trained, self.learner.settings.positions - 1
        wanted = {d, k // 2, k - 1, k, k + 1, 3 * k // 2, 2 * k, 3 * k, most}
        return sorted(n for n in wanted if 1 <= n <= most)


class Fitted:
    """A method fitted on the class, and its vectors for given functions, with the controls."""

    def __init__(self, bench: Bench, writer: Writer, place: Place, teach: Support, look: Support) -> None:
        self.name = writer.name
        self.write = writer.fit(bench.learner, teach, look, seed=bench.seed)

    def tried(self, supports: Supports) -> dict[str, list[Vectors]]:
        """The vectors by the control's name ("": the method itself); of other functions there are several draws."""
        own = self.write(supports[""])
        if self.name == ConstantVectors.name:
            return {"": [own]}
        count = len(own)
        return {
            "": [own],
            WRONG: [[own[i] for i in shifted(count, by)] for by in range(1, OTHERS + 1)],
            MEAN: [self.write(supports[MEAN]) * count],
            SHUFFLED: [self.write(supports[SHUFFLED])],
        }


@dataclass(frozen=True, eq=False)
class Stand:
    """Where vectors are tried: test prompts of one place, and the same queries behind as many own examples as the model
    was trained on (`best`)."""

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
        return squared(self.behind.predictions, self.best)[0]

    def bare(self) -> list[RegressRow]:
        """The model as it is, at this place; where fidelity is measured, behind its own examples too."""
        found = ask(self.prompts, [[None] * self.prompts.count], states=True)
        rows = [self._row(VANILLA, "", squared(found.predictions, self.prompts)[0], found)]
        if self.scores:
            rows.append(replace(self._row(EXAMPLES, "", self.examples, None), examples=self.bench.trained))
        return rows

    def rows(self, method: str, tried: Mapping[str, Sequence[Vectors]]) -> list[RegressRow]:
        """A method and its controls."""
        out = list[RegressRow]()
        for control, draws in tried.items():
            found = ask(self.prompts, draws, states=self.compares)
            out.append(self._row(method, control, squared(found.predictions, self.prompts).mean(0), found))
        return out

    @property
    def scores(self) -> bool:
        """Does the prompt say nothing of the function?"""
        return self.place.examples == 0 or not self.place.own

    @property
    def compares(self) -> bool:
        """Are there last states to compare with those at the best length? Not below it, nor under shifts."""
        return self.name == LENGTH and self.place.examples > self.bench.trained

    def _row(self, method: str, control: str, wrong: Float[Tensor, " F"], found: Asked | None) -> RegressRow:
        score, aligned = None, None
        if self.scores:
            score = fidelity(wrong, self.prompts.values.square().mean(1), self.examples)
        if self.compares and found is not None:
            aligned = alignment(found.states[0], self.behind.states[0], owners(self.prompts))
        settings = self.bench.learner.settings
        return RegressRow(
            method=method,
            control=control,
            learner=settings.name,
            function=settings.function,
            test=self.name,
            examples=self.place.examples,
            seed=self.bench.seed,
            n=len(wrong),
            mse=mean(wrong.double().numpy()),
            fidelity=score,
            variance=settings.family.variance,
            trained=self.bench.trained,
            alignment=aligned,
        )

    def yardstick(self, name: str, guessed: Float[Tensor, "F P"]) -> RegressRow:
        """A row of predictions that no model made, for the first prompts of each function."""
        wrong = (guessed - self.prompts.values[:, : guessed.shape[1]]).square().mean(1)
        return self._row(name, YARDSTICK, wrong, None)


def squared(predictions: Float[Tensor, "C F P"], prompts: Prompts) -> Float[Tensor, "C F"]:
    """Each function's mean squared error."""
    return (predictions - prompts.values).square().mean(2)


def stand(bench: Bench, name: str, functions: Functions, place: Place) -> Stand:
    """Test prompts: the same points at every place of one length."""
    sizes, learner = bench.sizes, bench.learner

    def drawn(where: Place) -> Prompts:
        return Prompts.draw(learner, functions, sizes.queries, where, seed=bench.seed, what="test")

    prompts = drawn(place)
    return Stand(name, place, prompts, drawn(Place(bench.trained)).asked(prompts), bench)
