"""What every trained method shares: prompts in an engine, and the answers they are trained towards.

Each step is a replay with gradients: prompts up to their first edited token are run once for the whole fit; a step
costs the edited tokens and the answers. Shapes: t answer tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskvec.evaluate.metrics import kl
from taskvec.evaluate.observe import encode_answers
from taskvec.lm import LM, Encoded
from taskvec.lm.encode import Answer
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.tasks import Split
from taskvec.tasks.task import Loss
from taskvec.vector import TaskVector

Targets = Sequence[Answer]


@dataclass(frozen=True, eq=False)
class Lessons:
    """Prompts (from their token `starts[i]` on a vector may edit), answers, and what is wrong with an answer's logits.

    `loss(i, logits (t, V), answer (t,))` is a scalar for prompt i, lower is better.
    """

    engine: Packed | Plain
    targets: Targets
    loss: Callable[[int, Tensor, Tensor], Tensor]

    @classmethod
    def of(
        cls,
        lm: LM,
        prompts: Sequence[Encoded],
        targets: Targets,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        starts: Sequence[int] | None = None,
    ) -> "Lessons":
        """Teacher forcing with a task's own loss."""
        engine = replay(lm, prompts, starts=starts, keep=True)
        return cls(engine, tuple(targets), lambda _, logits, answer: loss(logits, answer))

    @classmethod
    def together(cls, lm: LM, rows: Sequence["Row"], *, whole: bool) -> "Lessons":
        """Rows of several tasks, each under its task's loss. `whole`: every token of a prompt may be edited, not only
        its last."""
        prompts, losses = [row.prompt for row in rows], [row.loss for row in rows]
        engine = replay(lm, prompts, starts=[0] * len(prompts) if whole else None, keep=True)
        return cls(engine, tuple(row.target for row in rows), lambda i, logits, answer: losses[i](logits, answer))

    def descend(self, vectors: Sequence[TaskVector], picked: Sequence[int]) -> float:
        """Gradients of every vector's mean loss over the `picked` prompts, in one backward pass. Their losses add up:
        no parameter of one appears in another's. Returns the sum."""
        return self._descend([(i, vector) for vector in vectors for i in picked], len(picked))

    def descend_each(self, vectors: Sequence[TaskVector], picked: Sequence[int]) -> float:
        """Gradients of the mean loss where each `picked` prompt has a vector of its own. Returns the mean."""
        return self._descend(list(zip(picked, vectors, strict=True)), len(picked))

    @torch.no_grad()
    def mean_losses(self, vectors: Sequence[TaskVector]) -> list[float]:
        """Each vector's mean loss over all prompts."""
        n = len(self.targets)
        losses = self.losses([(i, vector) for vector in vectors for i in range(n)])
        return [sum(losses[k : k + n]) / n for k in range(0, len(losses), n)]

    @torch.no_grad()
    def losses(self, pairs: Sequence[tuple[int, TaskVector]]) -> list[float]:
        """The loss of each prompt under its vector."""
        found = dict[int, float]()
        for numbers, losses in self._losses(pairs):
            found |= dict(zip(numbers, map(float, losses), strict=True))
        return [found[k] for k in range(len(pairs))]

    def _descend(self, pairs: Sequence[tuple[int, TaskVector]], count: int) -> float:
        total = 0.0
        with torch.enable_grad():
            for _, losses in self._losses(pairs):
                loss = torch.stack(losses).sum() / count
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total

    def _losses(self, pairs: Sequence[tuple[int, TaskVector]]) -> Iterator[tuple[list[int], list[Tensor]]]:
        trials = [Trial(i, vector, self.targets[i][:-1]) for i, vector in pairs]
        for numbers, logits in self.engine.batches(trials):
            device = self.engine.lm.device
            prompts = [trials[n].prompt for n in numbers]
            answers = [torch.tensor(self.targets[i], device=device) for i in prompts]
            yield numbers, [self.loss(*item) for item in zip(prompts, logits, answers, strict=True)]


@dataclass(frozen=True, eq=False)
class Row:
    """A bare prompt, its gold answer with the terminator, and its task's loss."""

    prompt: Encoded
    target: Answer
    loss: Loss


def rows_of(lm: LM, splits: Sequence[Split]) -> list[Row]:
    """The rows of several tasks' splits, task by task."""
    out = list[Row]()
    for split in splits:
        prompts = [lm.encode(split.spec.format.prompt(example.input)) for example in split.examples]
        pairs = zip(prompts, encode_answers(lm, split)[0], strict=True)
        out += [Row(prompt, gold, split.spec.loss) for prompt, gold in pairs]
    return out


@torch.no_grad()
def distilled(
    lm: LM, students: Sequence[Encoded], teachers: Sequence[Encoded], ask: Ask, *, starts: Sequence[int] | None = None
) -> Lessons:
    """Lessons without labels: towards the teacher prompts' greedy answers and their distributions at every token.

    The loss is the mean over tokens of KL(teacher || student), in nats. The teacher's n x t x V logits are kept
    (float32, on the CPU): lower the number of queries where that is too much.
    """
    engine = replay(lm, teachers)
    answers = engine.answer([Trial(i) for i in range(len(teachers))], ask).tokens
    targets = [_with_end(lm, i, answer, ask) for i, answer in enumerate(answers)]
    references: dict[int, Tensor] = {}
    for numbers, logits in engine.batches([Trial(i, None, target[:-1]) for i, target in enumerate(targets)]):
        references |= dict(zip(numbers, (out.float().cpu() for out in logits), strict=True))

    def loss(i: int, logits: Tensor, _: Tensor) -> Tensor:
        return kl(references[i].to(logits.device), logits).mean()

    return Lessons(replay(lm, students, starts=starts, keep=True), tuple(targets), loss)


def _with_end(lm: LM, i: int, answer: Sequence[int], ask: Ask) -> tuple[int, ...]:
    """An answer that the teacher ended by an end token, with one: the student learns its distribution there too. Which
    one it was does not matter, as nothing is read behind it."""
    full = len(answer) == ask.max_new or ask.done(i, lm.decode(answer))
    return tuple(answer) if full else (*answer, min(lm.end_ids, default=0))
