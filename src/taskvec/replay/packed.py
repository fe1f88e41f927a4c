"""The packed engine: prompts once, trials for the price of their last tokens.

Shapes: n trials, V vocabulary.

The longest common token prefix of all prompts is run once (shared prefix). Behind it each prompt's own tokens up to its
first edited one are run once, in groves of a bounded size. Each trial then costs its edited tokens and its answer
(last-token replay). All three are segments of one tree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from taskvec.hooks import Captured
from taskvec.lm import LM, Encoded
from taskvec.replay.plain import ended, logprob, stack
from taskvec.replay.stagger import grow_staggered, staggers
from taskvec.replay.tree import ROOT, Segment, Tree
from taskvec.replay.trials import Answers, Ask, Budget, Trial
from taskvec.sites import Site
from taskvec.vector import Edit, TaskVector

KEPT_PARTS = 4  # passes joined in a kept grove: more would cost its trials more attention than they save passes


@dataclass(frozen=True, eq=False)
class Packed:
    """An engine over `prompts`, of which tokens from `starts` on may be edited.

    `keep` holds every grove's keys and values, for trials that come again and again (training); else one at a time.
    What is kept is asked for few tokens of many prompts at a time: there, fewer and larger groves are faster.
    """

    lm: LM
    prompts: Sequence[Encoded]
    starts: Sequence[int]
    budget: Budget = field(default_factory=Budget)
    keep: bool = False
    packed: bool = field(default=True, init=False)
    _kept: dict[int, tuple[Tree, dict[int, int]]] = field(default_factory=dict, init=False, repr=False)

    # --- what is run once --------------------------------------------------------------------------------------------

    @cached_property
    def shared(self) -> int:
        """Tokens all prompts have in common and no trial edits."""
        first = self.prompts[0]
        return min(min(self.starts), *(first.shared(prompt) for prompt in self.prompts))

    @property
    def once(self) -> int:
        """Tokens that are run once for all trials: the shared prefix, and each prompt up to its start."""
        return self.shared + sum(start - self.shared for start in self.starts)

    @property
    def held(self) -> int:
        """Those of them that are held by now, and not run again."""
        kept = [number for grove in self._kept for part in self._groves[grove] for number in part]
        return self.shared * ("_root" in vars(self)) + sum(self.starts[number] - self.shared for number in kept)

    @cached_property
    def _root(self) -> tuple[Tree, int]:
        empty = Tree(self.lm)
        if not self.shared:
            return empty, ROOT
        with torch.no_grad():
            return empty.grow([Segment(ROOT, self.prompts[0].tokens(0, self.shared))]).tree, 0

    @cached_property
    def _groves(self) -> list[list[list[int]]]:
        """Prompts in groves, each of parts whose own tokens fit into one pass."""
        parts, size = list[list[int]](), 0
        for number, start in enumerate(self.starts):
            new = start - self.shared
            if not parts or not self.budget.fits(size + new, self.shared):
                parts.append([])
                size = 0
            parts[-1].append(number)
            size += new
        joined = KEPT_PARTS if self.keep else 1
        return [parts[i : i + joined] for i in range(0, len(parts), joined)]

    @cached_property
    def _grove_of(self) -> dict[int, int]:
        return {number: grove for grove, parts in enumerate(self._groves) for part in parts for number in part}

    def _grove(self, grove: int) -> tuple[Tree, dict[int, int]]:
        """The tree with a grove's prompts up to their starts, and each prompt's segment in it."""
        if grove in self._kept:
            return self._kept[grove]
        tree, root = self._root
        grown, nodes = list[Tree](), dict[int, int]()
        shift = 0
        for part in self._groves[grove]:
            nodes |= dict.fromkeys(part, root)
            bodies = [n for n in part if self.starts[n] > self.shared]
            if not bodies:
                continue
            segments = [Segment(root, self.prompts[n].tokens(self.shared, self.starts[n])) for n in bodies]
            with torch.no_grad():
                new = tree.grow(segments)
            grown.append(new.tree)
            nodes |= {n: node + shift for n, node in zip(bodies, new.nodes, strict=True)}
            shift += len(bodies)
        out = tree.joined(grown), nodes
        if self.keep:
            self._kept[grove] = out
        return out

    # --- trials ------------------------------------------------------------------------------------------------------

    def batches(self, trials: Sequence[Trial]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """(numbers of some trials, their logits from the last prompt token on: (1 + len(continuation), V) each).

        Gradients flow if they are on; go backward before taking the next.
        """
        for tree, numbers, segments in self._chunks(trials):
            yield numbers, list(tree.grow(segments).logits)

    def reached(self, trials: Sequence[Trial], site: Site) -> Iterator[tuple[list[int], Tensor]]:
        """(numbers of some trials without continuations, their states (n, w) of a site at the last prompt token).
        Gradients flow, as in `batches`."""
        assert not any(trial.continuation for trial in trials)
        for tree, numbers, segments in self._chunks(trials):
            seen = tree.grow(segments, states=(site,)).states
            assert seen is not None
            yield numbers, seen[site][0]

    @torch.no_grad()
    def answer(self, trials: Sequence[Trial], ask: Ask) -> Answers:
        """What `ask` wants of each trial. Labels and greedy answers grow on the trial's own segment."""
        found: dict[int, _Found] = {}
        for tree, numbers, segments in self._chunks(trials):
            if _first_token_only(ask, segments) and staggers(self.lm):
                here = _Here(tree, (), grow_staggered(tree, segments), numbers, [trials[i] for i in numbers])
                found |= dict(zip(numbers, self._found(here, None, ask), strict=True))
                continue
            grown = tree.grow(segments, states=ask.states)
            lasts = [out[-1] for out in grown.logits]
            here = _Here(grown.tree, grown.nodes, lasts, numbers, [trials[i] for i in numbers])
            found |= dict(zip(numbers, self._found(here, grown.states, ask), strict=True))
        return _gathered([found[i] for i in range(len(trials))], ask)

    def _found(self, here: "_Here", seen: Captured | None, ask: Ask) -> "list[_Found]":
        labels = self._labels(here, ask) if ask.labels else [None] * len(here.trials)
        tokens = self._greedy(here, ask) if ask.max_new else [None] * len(here.trials)
        kept = [
            ask.keep(i, last.float()).cpu() if ask.keep else None
            for i, last in zip(here.numbers, here.lasts, strict=True)
        ]
        states = [[seen[s][0, i].float().cpu() for s in ask.states] if seen else [] for i in range(len(here.trials))]
        return [_Found(*parts) for parts in zip(kept, labels, tokens, states, strict=True)]

    def _chunks(self, trials: Sequence[Trial]) -> Iterator[tuple[Tree, list[int], list[Segment]]]:
        """Trials grove by grove, in passes that fit the budget."""
        by_grove = sorted(range(len(trials)), key=lambda i: self._grove_of[trials[i].prompt])
        rows = self.budget.rows(self.lm.vocabulary)
        for grove, group in groupby(by_grove, key=lambda i: self._grove_of[trials[i].prompt]):
            tree, node_of = self._grove(grove)
            numbers, segments, new, kept = list[int](), list[Segment](), 0, 0
            for i in group:
                segment = self._segment(trials[i], node_of[trials[i].prompt])
                new, kept = new + len(segment), kept + segment.keep
                if segments and (kept > rows or not self.budget.fits(new, len(tree))):
                    yield tree, numbers, segments
                    numbers, segments, new, kept = [], [], len(segment), segment.keep
                numbers.append(i)
                segments.append(segment)
            yield tree, numbers, segments

    def _segment(self, trial: Trial, parent: int) -> Segment:
        """The trial's own tokens: from the prompt's first editable one to the end of its continuation."""
        prompt, start = self.prompts[trial.prompt], self.starts[trial.prompt]
        length = prompt.prompt_length
        tail = prompt.tokens(start, length)
        if trial.continuation:
            assert isinstance(tail, tuple)
            tail = tail + trial.continuation
        edits = []
        for edit in _edits(trial.vector):
            offsets = [t - start for t in edit.where.tokens(length, prompt.roles)]
            offsets += list(range(length - start, len(tail))) if edit.where.every_step else []
            edits.append((edit, tuple(offsets)))
        return Segment(parent, tail, tuple(edits), keep=1 + len(trial.continuation))

    def _labels(self, here: "_Here", ask: Ask) -> list[Tensor]:
        """Each label's log-probability: its first token from the trial's logits, the rest as a segment behind it."""
        longer = [(t, label) for t in range(len(here.trials)) for label in ask.labels if len(label) > 1]
        segments = [_behind(here.nodes[t], label[:-1], here.trials[t].vector) for t, label in longer]
        outs = _grown_in_parts(here.tree, segments, self.budget)
        rest = {key: logprob(out, key[1][1:]) for key, out in zip(longer, outs, strict=True)}
        rows = []
        for t, last in enumerate(here.lasts):
            logs = last.float().log_softmax(-1).cpu()
            rows.append(torch.stack([logs[label[0]] + rest.get((t, label), 0.0) for label in ask.labels]))
        return rows

    def _greedy(self, here: "_Here", ask: Ask) -> list[list[int]]:
        """Each trial's greedy answer: a token a pass, for all that are not done."""
        answers = [[int(last.argmax())] for last in here.lasts]
        tree, ends = here.tree, list(here.nodes)
        for _ in range(ask.max_new - 1):
            rows = [i for i, answer in enumerate(answers) if not ended(self.lm, here.numbers[i], answer, ask)]
            if not rows:
                break
            grown = tree.grow([_behind(ends[i], (answers[i][-1],), here.trials[i].vector) for i in rows])
            tree = grown.tree
            for i, node, logits in zip(rows, grown.nodes, grown.logits, strict=True):
                ends[i] = node
                answers[i].append(int(logits[-1].argmax()))
        return [self.lm.before_end(answer) for answer in answers]


def _first_token_only(ask: Ask, segments: Sequence[Segment]) -> bool:
    """Is the first answer token all that is wanted, of several trials of one token each?"""
    short = ask.max_new <= 1 and all(len(label) <= 1 for label in ask.labels) and not ask.states
    return short and len(segments) > 1 and all(len(segment) == 1 for segment in segments)


@dataclass(frozen=True, eq=False)
class _Here:
    """The trials of one pass: the tree that holds them, their segments, their last prompt token's logits, their
    numbers."""

    tree: Tree
    nodes: Sequence[int]
    lasts: Sequence[Tensor]
    numbers: Sequence[int]
    trials: Sequence[Trial]


@dataclass(frozen=True, eq=False)
class _Found:
    """One trial's answers."""

    kept: Tensor | None
    labels: Tensor | None
    tokens: list[int] | None
    states: list[Tensor]


def _gathered(found: Sequence[_Found], ask: Ask) -> Answers:
    return Answers(
        stack([one.kept for one in found if one.kept is not None], len(found)),
        stack([one.labels for one in found if one.labels is not None], len(found)),
        [one.tokens for one in found if one.tokens is not None],
        {site: torch.stack([one.states[k] for one in found]) for k, site in enumerate(ask.states)},
    )


def _edits(vector: TaskVector | None) -> tuple[Edit, ...]:
    return vector.edits if vector is not None else ()


def _behind(parent: int, tokens: tuple[int, ...], vector: TaskVector | None) -> Segment:
    """Answer tokens behind a trial: edited where the vector acts at every step."""
    every = tuple((edit, tuple(range(len(tokens)))) for edit in _edits(vector) if edit.where.every_step)
    return Segment(parent, tokens, every, keep=len(tokens))


def _grown_in_parts(tree: Tree, segments: Sequence[Segment], budget: Budget) -> list[Tensor]:
    """The kept logits of segments that don't see each other, in passes that fit the budget."""
    outs, part = list[Tensor](), list[Segment]()
    for segment in segments:
        if part and not budget.fits(sum(map(len, part)) + len(segment), len(tree)):
            outs += tree.grow(part).logits
            part = []
        part.append(segment)
    return outs + list(tree.grow(part).logits) if part else outs
