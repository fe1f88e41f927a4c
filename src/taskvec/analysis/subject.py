"""A task vector where it works: its model, its task's prompts, and what is right there.

Shapes: n prompts, V vocabulary, K labels, d width of the residual stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taskvec.analysis.finding import share
from taskvec.errors import InputError
from taskvec.evaluate.observe import check_template, check_unseen, encode_answers, first_tokens
from taskvec.hooks import check_fits, require
from taskvec.lm import LM, Encoded
from taskvec.prompts import Example
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.results import Metric
from taskvec.sites import Site
from taskvec.tasks import Split, Task
from taskvec.vector import Add, Edit, TaskVector


@dataclass(frozen=True, eq=False)
class Beside:
    """What a vector is compared with: another task, for side effects and conflicts; other vectors of its model."""

    task: Task | None = None
    vectors: tuple[TaskVector, ...] = ()


@dataclass(frozen=True, eq=False)
class Subject:
    """One vector, added to the residual stream at the last prompt token, on the first `n` test items of a task.

    Analyses move it to other layers and strengths, so it has to be one such edit.
    """

    lm: LM
    vector: TaskVector
    task: Task
    split: Split
    demos: tuple[Example, ...]
    seed: int = 0
    beside: Beside = Beside()

    @classmethod
    def of(
        cls,
        lm: LM,
        vector: TaskVector,
        task: Task,
        *,
        n: int = 40,
        seed: int = 0,
        beside: Beside = Beside(),
    ) -> "Subject":
        """Raises `VectorMismatch` for a vector of another model or template, `InputError` for test items that it was
        fitted on, one that is not one addition to the residual stream at the last prompt token, fewer than two items,
        and answers that all begin with one token, where a right first token says nothing."""
        if n < 2:
            raise InputError("at least two items", f"n = {n}", "raise it")
        check_fits(lm, vector)
        check_template(task.spec, vector.origin)
        site, _ = one_addition(vector)
        require(lm, site)
        check_unseen(task.test, vector.origin)
        own = vector.origin is not None and vector.origin.data_hash == task.spec.data_hash
        shown = vector.origin.demos if own and vector.origin is not None else ()
        demos = shown or task.train.demonstrations(seed=seed)
        for one in beside.vectors:
            check_fits(lm, one)
        split = replace(task.test, examples=task.test.examples[:n])
        subject = cls(lm, vector, task, split, tuple(demos), seed, beside)
        subject._tell_answers_apart()
        return subject

    def _tell_answers_apart(self) -> None:
        if len(self.task.spec.outputs) > 1 and len(self.labels) == 1:
            same = repr(self.lm.tokenizer.decode(self.labels))
            found = f"{same} before all {len(self.task.spec.outputs)} outputs of {self.task.name}"
            hint = "change the prompt format, or update transformers and tokenizers: some versions split off a blank"
            raise InputError("answers that begin with different tokens", found, hint)

    @property
    def edit(self) -> Edit:
        """The vector's one edit."""
        return self.vector.edits[0]

    @property
    def layer(self) -> int:
        """Where it is added."""
        assert self.edit.site.layer is not None
        return self.edit.site.layer

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """What is added, its strength counted."""
        return one_addition(self.vector)[1]

    def added(self, row: Float[Tensor, " d"], layer: int) -> TaskVector:
        """Another row, or layer, in its place."""
        return TaskVector((Edit(Site("resid", layer), Add(row), self.edit.where),))

    def random(self, number: int) -> Float[Tensor, " d"]:
        """The null: a random direction of the same norm, another one for each vector, seed and number."""
        drawn = crc32(self.direction.double().numpy().tobytes() + f"{self.seed} {number}".encode())
        generator = torch.Generator().manual_seed(drawn)
        row = torch.randn(self.direction.shape, generator=generator)
        scaled: Tensor = row * self.direction.norm() / row.norm()
        return scaled

    @cached_property
    def bare(self) -> list[Encoded]:
        """The zero-shot prompts."""
        return self._prompts(())

    @cached_property
    def behind(self) -> list[Encoded]:
        """The same queries behind the demonstrations."""
        return self._prompts(self.demos)

    @cached_property
    def golds(self) -> list[int]:
        """The first token of each item's answer."""
        return [int(gold[0]) for gold in encode_answers(self.lm, self.split)[0]]

    @cached_property
    def labels(self) -> list[int]:
        """The first tokens of the task's outputs, each once."""
        return sorted({int(tokens[0]) for tokens in first_tokens(self.lm, self.split)})

    @cached_property
    def engine(self) -> Packed | Plain:
        """The zero-shot prompts, for vectors at their last token."""
        return replay(self.lm, self.bare, keep=True)

    @cached_property
    def others(self) -> tuple[list[Encoded], list[int]]:
        """The other task's test items behind its demonstrations, at most as many as this one's; the first tokens of
        their answers. Raises `InputError` without another task."""
        if self.beside.task is None:
            raise InputError("another task", "none", "name one with --against")
        test = self.beside.task.test
        split = replace(test, examples=test.examples[: len(self.split.examples)])
        demos = self.beside.task.train.demonstrations(seed=self.seed)
        prompts = [self.lm.encode(split.spec.format.prompt(one.input, demos)) for one in split.examples]
        return prompts, [int(gold[0]) for gold in encode_answers(self.lm, split)[0]]

    def hits(self, vectors: Sequence[TaskVector | None]) -> Bool[Tensor, " n"]:
        """Which items' likeliest first token is the answer's, each under a vector of its own (zero-shot prompts)."""
        trials = [Trial(i, vector) for i, vector in enumerate(vectors)]
        found: Tensor = self.engine.answer(trials, Ask(keep=likeliest)).kept == torch.tensor(self.golds)
        return found

    def accuracy(self, vector: TaskVector | None) -> Metric:
        """The share of hits under one vector."""
        return share(self.hits([vector] * len(self.bare)))

    def states(
        self, prompts: Sequence[Encoded], vector: TaskVector | None, sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "n d"]]:
        """The states at the last prompt token."""
        trials = [Trial(i, vector) for i in range(len(prompts))]
        return replay(self.lm, prompts).answer(trials, Ask(states=tuple(sites))).states

    def _prompts(self, shown: Sequence[Example]) -> list[Encoded]:
        format = self.split.spec.format
        return [self.lm.encode(format.prompt(example.input, shown)) for example in self.split.examples]


def likeliest(_: int, logits: Float[Tensor, " V"]) -> Tensor:
    """The likeliest token, as what to keep of logits (a whole number: floats hold any vocabulary's)."""
    return logits.argmax().float()


def one_addition(vector: TaskVector) -> tuple[Site, Float[Tensor, " d"]]:
    """Where a vector is added, and what, its strength counted. Raises `InputError` for any other vector than one that
    is added to the residual stream at the last prompt token."""
    edits = vector.edits
    there = len(edits) == 1 and edits[0].site.kind == "resid" and isinstance(edits[0].op, Add)
    if not there or edits[0].where.kind not in ("last_prompt", "each_last"):
        found = ", ".join(f"{type(edit.op).__name__.lower()} at {edit.site} ({edit.where})" for edit in edits)
        wanted = "one vector added at resid[l], at the last prompt token"
        raise InputError(wanted, found or "no edit", "analyse a vector of function-vector or learned")
    return edits[0].site, edits[0].op.tensors()["vector"] * edits[0].strength
