"""Running a split under a condition, once: everything the scores are computed from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError, VectorMismatch
from taskvec.evaluate.shared import engine_of
from taskvec.hooks import check_fits, prove
from taskvec.lm import LM, Encoded
from taskvec.lm.encode import Answer
from taskvec.prompts import Example
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.replay.trials import first_edited
from taskvec.sites import Site
from taskvec.tasks import Split, TaskSpec, Test
from taskvec.vector import Adapted, Origin, Predictor, TaskVector, VectorSource, Where

Condition = TaskVector | VectorSource | Adapted | Predictor | None
"""What is scored: a vector, a source, an adapted model, a predictor; None is the bare zero-shot prompt."""
NEVER = -1e4
"""The logit of what a predictor cannot answer."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What a condition gave on a split. Shapes: n examples, V vocabulary, L labels, d width. `texts` are the cut greedy
    answers; of a predictor, which generates nothing, its labels, and its logits are those of the labels' first tokens
    (`NEVER` elsewhere; `open` is False). `states` are those at the input of the head (None where there are none)."""

    split: Split
    prompts: tuple[Encoded, ...]
    logits: Float[Tensor, "n V"]
    label_logprobs: Float[Tensor, "n L"]
    texts: tuple[str, ...]
    golds: tuple[tuple[int, ...], ...]
    open: bool = True
    states: Float[Tensor, "n d"] | None = None

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """The likeliest label of each example (None for an open task)."""
        names = self.split.spec.labels
        return None if names is None else tuple(names[int(i)] for i in self.label_logprobs.argmax(-1))

    @property
    def predictions(self) -> tuple[str, ...]:
        """The label where there are labels, else the cut answer: what `agreement` compares."""
        return self.labels if self.labels is not None else self.texts


def observe(lm: LM, split: Split, condition: Condition = None) -> Observation:
    """Run every example of a split under a condition: logits at the last prompt token, labels, greedy answers.

    Raises `VectorMismatch` for a vector of another model or another template.
    """
    if lm.answers_numbers:
        wanted, fix = "a language model, whose answers are text", "measure function learners with taskvec.regress"
        raise InputError(wanted, f"{lm.id}, which answers numbers", fix)
    origin = condition.origin if condition is not None else None
    check_template(split.spec, origin)
    check_unseen(split, origin)
    prove(lm)  # before a rival changes it
    check_fits(lm, condition)
    shown = origin.shown if origin is not None else ()
    prompts = tuple(lm.encode(split.spec.format.prompt(example.input, shown)) for example in split.examples)
    golds, labels, longest = encode_answers(lm, split, shown)
    if isinstance(condition, Predictor):
        return _predicted(lm, split, condition, prompts, golds, labels)
    ends = split.spec.format.terminator
    head = _head_site(lm, condition)
    ask = Ask(lambda _, row: row, labels, longest, lambda _, text: ends in text, head)
    with _applied(lm, condition):
        engine, trials = _engine(lm, prompts, condition)
        answers = engine.answer(trials, ask)
    texts = tuple(split.spec.format.cut(lm.decode(tokens)) for tokens in answers.tokens)
    states = answers.states[head[0]] if head else None
    return Observation(split, prompts, answers.kept, answers.label_logprobs, texts, golds, states=states)


def _head_site(lm: LM, condition: Condition) -> tuple[Site, ...]:
    """The input of the head, where it can be read: not below an adapter, which may shift the tokens."""
    site = Site("lm_head_in")
    there = site in lm.sites() and site not in lm.proofs["sites"]
    return (site,) if there and not isinstance(condition, Adapted) else ()


@contextmanager
def _applied(lm: LM, condition: Condition) -> Iterator[None]:
    """The model as the condition has it. What was proved of the bare model says nothing of an adapted one."""
    if not isinstance(condition, Adapted):
        yield
        return
    proofs = lm.proofs
    with condition.applied(lm), lm.unproved() if lm.proofs is proofs else nullcontext():
        yield


def _predicted(
    lm: LM,
    split: Split,
    predictor: Predictor,
    prompts: tuple[Encoded, ...],
    golds: tuple[tuple[int, ...], ...],
    labels: tuple[tuple[int, ...], ...],
) -> Observation:
    """A predictor's labels, and its distribution as logits of the labels' first tokens."""
    names = need_labels(split.spec, predictor.origin.method if predictor.origin is not None else "a predictor")
    logs = predictor.label_logprobs(lm, prompts).float().cpu()
    logits = torch.full((len(prompts), lm.vocabulary), NEVER)
    for column, label in enumerate(labels):
        logits[:, label[0]] = torch.maximum(logits[:, label[0]], logs[:, column])
    texts = tuple(names[int(i)] for i in logs.argmax(-1))
    return Observation(split, prompts, logits, logs, texts, golds, open=False)


def need_labels(spec: TaskSpec, method: str) -> tuple[str, ...]:
    """The task's labels. Raises `InputError` where it has none, for a method that chooses among them."""
    if spec.labels is None:
        wanted = f"a task with labels, for {method}"
        found = f"{spec.name}, whose answers are free text"
        raise InputError(wanted, found, "name them in the sidecar (labels: [...]), or use another method")
    return spec.labels


def encode_answers(
    lm: LM, split: Split, shown: Sequence[Example] = ()
) -> tuple[tuple[Answer, ...], tuple[Answer, ...], int]:
    """(each example's answer with its terminator, each label without, how many tokens the task's longest answer
    has)."""
    spec = split.spec
    prompts = [spec.format.prompt(example.input, shown) for example in split.examples]
    golds = tuple(
        lm.answer_ids(prompt, example.output, spec.format, terminator=True)
        for prompt, example in zip(prompts, split.examples, strict=True)
    )
    labels = tuple(lm.answer_ids(prompts[0], name, spec.format, terminator=False) for name in spec.labels or ())
    return golds, labels, max(len(ids) for ids in first_tokens(lm, split, terminator=True))


def first_tokens(lm: LM, split: Split, *, terminator: bool = False) -> list[Answer]:
    """The tokens of each of the task's distinct outputs, behind a zero-shot prompt."""
    prompt = split.spec.format.prompt(split.examples[0].input)
    return [lm.answer_ids(prompt, output, split.spec.format, terminator=terminator) for output in split.spec.outputs]


def reaching(lm: LM, split: Split, where: str) -> Where:
    """The tokens `where` names. Raises `InputError` for a role or position that the task's prompts don't have."""
    found, prompt = Where.parse(where), lm.encode(split.spec.format.prompt(split.examples[0].input))
    if not found.tokens(prompt.prompt_length, prompt.roles):
        has = f"where = {where}, which is nowhere in a prompt of {prompt.prompt_length} tokens"
        raise InputError("tokens that a zero-shot prompt has", has, f"name others, or a role of {sorted(prompt.roles)}")
    return found


def check_template(spec: TaskSpec, origin: Origin | None) -> None:
    """Refuse a vector that was made under another prompt format."""
    if origin is not None and not origin.any_format and origin.format.hash != spec.format.hash:
        raise VectorMismatch(
            f"a vector made for the template {spec.format.template!r} (instruction {spec.format.instruction!r})",
            f"one for {origin.format.template!r} (instruction {origin.format.instruction!r})",
            "use the vector's own format, or compile the task again",
        )


def check_unseen(split: Split, origin: Origin | None) -> None:
    """Refuse test items of the very data a vector was fitted on, where a larger test split would reach into its
    train; and its own demonstrations as test items, where the data has changed since."""
    if not isinstance(split, Test) or origin is None:
        return
    kept = origin.kept_away.get(split.spec.data_hash)
    if kept is not None and split.spec.n_test > kept:
        found = f"{split.spec.n_test}: some of them were in its dev or train split"
        raise InputError(f"at most the {kept} test items kept from the vector", found, "lower --n-test")
    if seen := set(origin.demos) & set(split.examples):
        found = f"{len(seen)} of its demonstrations among them: the data was changed after it was fitted"
        raise InputError("test items that the vector has not seen", found, "fit it again on this data")


def _engine(
    lm: LM, prompts: Sequence[Encoded], condition: TaskVector | VectorSource | Adapted | None
) -> tuple[Packed | Plain, list[Trial]]:
    if isinstance(condition, Adapted):
        return replay(lm, prompts), [Trial(i) for i in range(len(prompts))]
    vectors: Sequence[TaskVector | None] = (
        condition.vectors(lm, prompts) if isinstance(condition, VectorSource) else [condition] * len(prompts)
    )
    starts = [first_edited(prompt, vector) for prompt, vector in zip(prompts, vectors, strict=True)]
    bare = condition is None or condition.origin is None or not condition.origin.shown
    engine = engine_of(lm, prompts, starts) if bare else replay(lm, prompts, starts=starts)
    return engine, [Trial(i, vector) for i, vector in enumerate(vectors)]
