"""Choosing on dev, inside a fit: many candidate vectors on the same prompts, by replay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taskvec.evaluate.fitting import Fitting
from taskvec.evaluate.observe import encode_answers
from taskvec.evaluate.shared import engine_of
from taskvec.lm import LM
from taskvec.replay import Answers, Ask, Trial
from taskvec.replay.trials import first_edited
from taskvec.tasks import Dev
from taskvec.vector import TaskVector

HALF = "\ufffd"
"""What a tokenizer shows for a character whose last bytes are still to come."""


@dataclass(frozen=True)
class Choice:
    """The best candidate's place, and each candidate's dev accuracy and mean log-probability of the first gold
    token."""

    best: int
    accuracy: tuple[float, ...]
    logprob: tuple[float, ...]


Gold = int | float
"""A token, or the number that a function learner should answer."""


def goodness(lm: LM, logits: Tensor, gold: Gold) -> Tensor:
    """What a method wants to rise at the last prompt token: the probability of the gold token `gold`; of a function
    learner, whose gold is a number, minus the squared error of its prediction."""
    if lm.answers_numbers:
        return -(logits[0] - gold).square()
    return logits.softmax(-1)[int(gold)]


def choose(lm: LM, dev: Dev, candidates: Sequence[TaskVector], *, limit: int | None = None) -> Choice:
    """The candidate with the highest accuracy on the first `limit` dev items; ties by log-probability, then by order.

    Label accuracy where the task has labels, else exact greedy answers. Of a function learner, whose answers are never
    exact: the smallest squared error (`logprob` is minus that). The prompts are run once; each candidate then
    costs its edited tokens and its answers.
    """
    dev = replace(dev, examples=dev.examples[:limit])
    prompts = [lm.encode(dev.spec.format.prompt(example.input)) for example in dev.examples]
    trials = [Trial(i, vector) for vector in candidates for i in range(len(prompts))]
    starts = [min(first_edited(prompt, vector) for vector in candidates) for prompt in prompts]
    answers = engine_of(lm, prompts, starts).answer(trials, _ask(lm, dev, trials))
    hits = torch.tensor(_hits(lm, dev, trials, answers)).float().reshape(len(candidates), -1).mean(1)
    logs = answers.kept.reshape(len(candidates), -1).mean(1)
    best = max(range(len(candidates)), key=lambda c: (float(hits[c]), float(logs[c]), -c))
    return Choice(best, tuple(hits.tolist()), tuple(logs.tolist()))


def pick(fitting: Fitting, dev: Dev, candidates: Sequence[TaskVector], n_dev: int) -> tuple[int, tuple[float, ...]]:
    """The best candidate's place and all dev accuracies, dev's labels counted as read. A single one needs no dev."""
    if len(candidates) == 1:
        return 0, ()
    fitting.labels += len(dev.examples[:n_dev])
    choice = choose(fitting.lm, dev, candidates, limit=n_dev)
    return choice.best, choice.accuracy


def _ask(lm: LM, dev: Dev, trials: Sequence[Trial]) -> Ask:
    """Each trial's log-probability of the gold answer's first token, and its labels or its greedy answer."""
    golds, labels, longest = encode_answers(lm, dev)
    ends = dev.spec.format.terminator

    def settled(trial: int, text: str) -> bool:
        """Complete, or already not the gold answer: an exact match is all that counts here."""
        begun = text.strip().rstrip(HALF)
        return ends in text or not dev.examples[trials[trial].prompt].output.startswith(begun)

    def gold_logprob(trial: int, logits: Tensor) -> Tensor:
        gold = golds[trials[trial].prompt][0]
        return goodness(lm, logits, gold) if lm.answers_numbers else logits.log_softmax(-1)[gold]

    return Ask(keep=gold_logprob, labels=labels, max_new=0 if labels or lm.answers_numbers else longest, done=settled)


def _hits(lm: LM, dev: Dev, trials: Sequence[Trial], answers: Answers) -> list[bool]:
    labels, cut = dev.spec.labels, dev.spec.format.cut
    if lm.answers_numbers:
        return [False] * len(trials)
    if labels:
        got = [labels[int(i)] for i in answers.label_logprobs.argmax(-1)]
    else:
        got = [cut(lm.decode(tokens)) for tokens in answers.tokens]
    return [text == dev.examples[trial.prompt].output for text, trial in zip(got, trials, strict=True)]
