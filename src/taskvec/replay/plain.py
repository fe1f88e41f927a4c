"""The plain way: whole prompts, padded, through `inject` and the model's own forward, without a cache.

It is what the packed engine is held against, and what serves models that cannot be packed. Same interface, same
numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taskvec.hooks import capture, inject
from taskvec.lm import LM, Encoded
from taskvec.replay.trials import Answers, Ask, Trial
from taskvec.sites import Site


@dataclass(frozen=True, eq=False)
class Plain:
    """An engine over `prompts` that runs every trial whole, `rows` at a time."""

    lm: LM
    prompts: Sequence[Encoded]
    rows: int = 16
    packed: bool = field(default=False, init=False)

    def batches(self, trials: Sequence[Trial]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """(numbers of some trials, their logits from the last prompt token on: (1 + len(continuation), V) each).

        Gradients flow if they are on; go backward before taking the next.
        """
        for start in range(0, len(trials), self.rows):
            numbers = list(range(start, min(start + self.rows, len(trials))))
            yield numbers, self._forward([trials[i] for i in numbers])[0]

    def reached(self, trials: Sequence[Trial], site: Site) -> Iterator[tuple[list[int], Tensor]]:
        """(numbers of some trials without continuations, their states (n, w) of a site at the last prompt token).
        Gradients flow, as in `batches`."""
        assert not any(trial.continuation for trial in trials)
        for start in range(0, len(trials), self.rows):
            numbers = list(range(start, min(start + self.rows, len(trials))))
            yield numbers, self._forward([trials[i] for i in numbers], (site,))[1][site]

    @torch.no_grad()
    def answer(self, trials: Sequence[Trial], ask: Ask) -> Answers:
        """What `ask` wants of each trial."""
        kept, labels, tokens, states = list[Tensor](), list[Tensor](), list[list[int]](), list[dict[Site, Tensor]]()
        for start in range(0, len(trials), self.rows):
            part = list(trials[start : start + self.rows])
            outs, seen = self._forward(part, ask.states)
            kept += [ask.keep(start + i, out[0].float()).cpu() for i, out in enumerate(outs)] if ask.keep else []
            labels += [self._labels(trial, ask.labels) for trial in part] if ask.labels else []
            tokens += self._greedy(range(start, start + len(part)), part, ask) if ask.max_new else []
            states.append(seen)
        joined = {site: torch.cat([seen[site] for seen in states]) for site in ask.states}
        return Answers(stack(kept, len(trials)), stack(labels, len(trials)), tokens, joined)

    def _forward(self, trials: Sequence[Trial], states: Sequence[Site] = ()) -> tuple[list[Tensor], dict[Site, Tensor]]:
        whole = [
            self.prompts[t.prompt].followed_by(t.continuation) if t.continuation else self.prompts[t.prompt]
            for t in trials
        ]
        batch = self.lm.batch(whole)
        with inject(self.lm, [t.vector for t in trials]), capture(self.lm, states) as seen:
            out = self.lm.forward(batch)
        last = batch.last
        rows = torch.arange(len(trials))
        kept = {site: seen[site][rows, last].float().cpu() for site in states}
        ends = [len(p) for p in whole]
        return [out[i, int(last[i]) : end] for i, end in enumerate(ends)], kept

    def _labels(self, trial: Trial, labels: Sequence[tuple[int, ...]]) -> Tensor:
        trials = [Trial(trial.prompt, trial.vector, label[:-1]) for label in labels]
        outs = [out for _, part in self.batches(trials) for out in part]
        return torch.stack([logprob(out, label) for out, label in zip(outs, labels, strict=True)])

    def _greedy(self, numbers: Sequence[int], trials: Sequence[Trial], ask: Ask) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in trials]
        open_rows = list(range(len(trials)))
        for _ in range(ask.max_new):
            steps = [Trial(trials[i].prompt, trials[i].vector, tuple(answers[i])) for i in open_rows]
            outs, _ = self._forward(steps)
            for i, out in zip(open_rows, outs, strict=True):
                answers[i].append(int(out[-1].argmax()))
            open_rows = [i for i in open_rows if not ended(self.lm, numbers[i], answers[i], ask)]
            if not open_rows:
                break
        return [self.lm.before_end(answer) for answer in answers]


def ended(lm: LM, trial: int, answer: Sequence[int], ask: Ask) -> bool:
    """Is a greedy answer complete?"""
    return answer[-1] in lm.end_ids or ask.done(trial, lm.decode(answer))


def logprob(logits: Tensor, label: Sequence[int]) -> Tensor:
    """Summed log-probability of a label's tokens, given the logits before each of them."""
    logs = logits.float().log_softmax(-1)
    return logs[torch.arange(len(label)), torch.tensor(label, device=logs.device)].sum().cpu()


def stack(rows: Sequence[Tensor], n: int) -> Tensor:
    """The rows as one tensor; (n, 0) where there are none."""
    return torch.stack(list(rows)) if rows else torch.zeros(n, 0)
