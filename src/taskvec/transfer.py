"""Transfer (Linear TV paper, arXiv 2605.20730): a larger model's few-shot effect as a vector for a smaller model.

All ways fit a ridge map W on N unlabelled queries at the input of the head, and add W h to the target's zero-shot
state. They differ in what they learn it from (L: source, S: target; h_icl, h_zs: states behind the few-shot prompt and
the bare one; U: unembedding):

    direct         h_zs(S) -> h_icl(L) - h_zs(S)              scenario 3-2; equal widths
    difference     h_zs(L) -> h_icl(L) - h_zs(L)              scenario 3-1; equal widths
    conjugated     the same, then M W M+                      scenario 3-4; one tokenizer
    aligned        h_zs(S) -> M h_icl(L) - h_zs(S)            scenario 3-3; one tokenizer
    tokens         the same, M over the token strings that both vocabularies have
    label-logits   h_zs(S) -> z_icl(L) - z_zs(S), the labels' logits, lifted by the pseudo-inverse of their rows

    M = argmin ||U_S M - U_L||^2

**Where we differ.** The paper's conjugation needs a square M; we use its pseudo-inverse. `tokens` and `label-logits`
are ours: they need neither equal widths nor one tokenizer. Label logits (on open tasks those of the first tokens of
train's outputs) are centred over the labels on both sides.

Shapes: N queries, d and D widths of target and source, K labels, R shared rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.comparison import dev_score, matched
from taskvec.errors import InputError, TaskvecError, unknown
from taskvec.evaluate import Fitting, at_least_one, observe, random_like, score_observed
from taskvec.evaluate.fitting import ready
from taskvec.evaluate.observe import first_tokens
from taskvec.evaluate.ridge import degrees_of_freedom, ridge_dual
from taskvec.evaluate.shared import shared_work, states_of
from taskvec.lm import LM
from taskvec.methods.linear import LinearTaskVector
from taskvec.methods.prompted import FewShot, ZeroShot
from taskvec.prompts import Example
from taskvec.results import Results
from taskvec.sites import Site
from taskvec.tasks import Task, Train
from taskvec.vector import Affine, Edit, TaskVector

HEAD = Site("lm_head_in")


@dataclass(frozen=True, eq=False)
class Pair:
    """The states of both models on the same queries, float64: what every way is fitted on."""

    source: LM
    target: LM
    train: Train
    zero_s: Float[Tensor, "N d"]
    zero_l: Float[Tensor, "N D"] | None
    icl_l: Float[Tensor, "N D"]
    ridge: float


@dataclass(frozen=True)
class TransferTaskVector:
    """Fields: `way` (above), `ridge` (the paper's 5.0), `queries` (unlabelled, the paper's 256)."""

    name: ClassVar[str] = "transfer"
    way: str = "tokens"
    ridge: float = 5.0
    queries: int = 256
    source: str = field(default="", kw_only=True)

    def fit(self, source: LM, target: LM, train: Train, *, seed: int = 0) -> TaskVector:
        """The vector for `target`. Raises `InputError` where the two models don't allow the way, before any pass."""
        self.check()
        check, made, uses = WAYS[self.way]
        check(source, target, train)
        method = replace(self, source=source.id)
        ready(source)
        with source.metered() as theirs, Fitting.of(target, method, train, seed=seed) as fitting:
            queries = train.queries(fitting.demos, self.queries, seed=seed)
            fitting.queries += len(queries)
            zero_s = fitting.states(queries, [HEAD])[HEAD].double()
            icl_l = _states(fitting, source, queries, fitting.show())
            zero_l = _states(fitting, source, queries, ()) if uses == "source" else None
            op = made(Pair(source, target, train, zero_s, zero_l, icl_l, self.ridge))
            features = zero_s if zero_l is None else zero_l
            found = {"degrees_of_freedom": degrees_of_freedom(features, self.ridge)}
            origin = fitting.origin(found=found)
        cost = origin.cost.model_copy(update={"tokens": origin.cost.tokens + theirs.tokens})
        named = {"method": f"transfer-{self.way}", "cost": cost}
        return TaskVector((Edit(HEAD, op),), origin.model_copy(update=named))

    def check(self) -> None:
        """Raise `InputError` for settings that mean nothing."""
        if self.way not in WAYS:
            raise unknown("a way of transfer", self.way, WAYS)
        at_least_one(self, "queries")
        if not 0 < self.ridge < float("inf"):
            raise InputError("a finite ridge above 0", f"ridge = {self.ridge}", "mend it")


def _states(fitting: Fitting, lm: LM, queries: Sequence[Example], shown: Sequence[Example]) -> Float[Tensor, "N w"]:
    """The source's states; what they took when they were computed for another way counts for this one too."""
    prompts = [lm.encode(fitting.train.spec.format.prompt(query.input, shown)) for query in queries]
    states, seconds = states_of(lm, prompts, [HEAD])
    fitting.started -= seconds
    return states[HEAD].double()


# --- the ways --------------------------------------------------------------------------------------------------------


def _map(features: Float[Tensor, "N w"], differences: Float[Tensor, "N d"], ridge: float) -> Affine:
    return Affine(features.float().contiguous(), ridge_dual(features, differences, ridge).float())


def _direct(pair: Pair) -> Affine:
    return _map(pair.zero_s, pair.icl_l - pair.zero_s, pair.ridge)


def _difference(pair: Pair) -> Affine:
    assert pair.zero_l is not None
    return _map(pair.zero_l, pair.icl_l - pair.zero_l, pair.ridge)


def _conjugated(pair: Pair) -> Affine:
    """M W M+: W = write' read, so the rows of `read` go through M+ and those of `write` through M."""
    assert pair.zero_l is not None
    m = alignment(*all_rows(pair.source, pair.target))
    write = ridge_dual(pair.zero_l, pair.icl_l - pair.zero_l, pair.ridge)
    read = pair.zero_l @ torch.linalg.pinv(m)
    return Affine(read.float().contiguous(), (write @ m.T).float().contiguous())


def _aligned(pair: Pair) -> Affine:
    return _through(alignment(*all_rows(pair.source, pair.target)), pair)


def _tokens(pair: Pair) -> Affine:
    return _through(alignment(*shared_rows(pair.source, pair.target)), pair)


def _through(m: Float[Tensor, "d D"], pair: Pair) -> Affine:
    return _map(pair.zero_s, pair.icl_l @ m.T - pair.zero_s, pair.ridge)


def _label_logits(pair: Pair) -> Affine:
    rows_s, rows_l = (_label_rows(lm, pair.train) for lm in (pair.target, pair.source))
    wanted = _centred(pair.icl_l @ rows_l.T) - _centred(pair.zero_s @ rows_s.T)
    lift = torch.linalg.pinv(rows_s - rows_s.mean(0))  # (d, K): the least change of a state with these centred logits
    return _map(pair.zero_s, wanted @ lift.T, pair.ridge)


def alignment(rows_s: Float[Tensor, "R d"], rows_l: Float[Tensor, "R D"]) -> Float[Tensor, "d D"]:
    """M = argmin ||U_S M - U_L||^2 = (U_S' U_S)^-1 U_S' U_L, in float64."""
    solved: Tensor = torch.linalg.lstsq(rows_s.double(), rows_l.double()).solution
    return solved


def all_rows(source: LM, target: LM) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R D"]]:
    """The unembedding rows of one vocabulary in both models: (target's, source's)."""
    ids = range(min(len(target.tokenizer), target.vocabulary, source.vocabulary))
    return _rows(target, ids), _rows(source, ids)


def shared_rows(source: LM, target: LM) -> tuple[Float[Tensor, "R d"], Float[Tensor, "R D"]]:
    """The unembedding rows of the token strings that both vocabularies have: (target's, source's)."""
    ours, theirs = token_strings(target), token_strings(source)
    pairs = [(i, theirs[text]) for text, i in ours.items() if text in theirs]
    return _rows(target, [i for i, _ in pairs]), _rows(source, [j for _, j in pairs])


def token_strings(lm: LM) -> dict[str, int]:
    """What each token writes behind another -> its number (the first, where several write the same).

    Behind another, because some tokenizers drop the blank before the first word of a text.
    """
    anchor = lm.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    rows = [anchor, *([*anchor, i] for i in range(min(len(lm.tokenizer), lm.vocabulary)))]
    before, *texts = lm.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False)
    out: dict[str, int] = {}
    for i, text in enumerate(texts):
        if text.startswith(before) and len(text) > len(before) and "\ufffd" not in text:  # a part of a character
            out.setdefault(text[len(before) :], i)
    return out


def _rows(lm: LM, ids: Iterable[int]) -> Float[Tensor, "R w"]:
    weight: Tensor = lm.model.get_output_embeddings().weight.detach()
    return weight[list(ids)].double().cpu()


def _label_rows(lm: LM, train: Train) -> Float[Tensor, "K w"]:
    return _rows(lm, [tokens[0] for tokens in first_tokens(lm, _of_train(train))])


def _of_train(train: Train) -> Train:
    """On open tasks with the outputs that train has: others are not for a fit to know."""
    outputs = train.spec.labels or tuple(sorted({example.output for example in train.examples}))
    return replace(train, spec=replace(train.spec, outputs=outputs))


def _centred(logits: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    return logits - logits.mean(-1, keepdim=True)


# --- what a way needs ------------------------------------------------------------------------------------------------

Check = Callable[[LM, LM, Train], None]


def _anything(source: LM, target: LM, train: Train) -> None:
    """Nothing is needed."""


def _equal_widths(source: LM, target: LM, train: Train) -> None:
    widths = source.width(HEAD), target.width(HEAD)
    if widths[0] != widths[1]:
        found = f"{widths[0]} in {source.id} and {widths[1]} in {target.id}"
        raise InputError("models of one width, for this way of transfer", found, "use tokens or label-logits")


def _one_tokenizer(source: LM, target: LM, train: Train) -> None:
    if source.tokenizer_hash != target.tokenizer_hash:
        found = f"those of {source.id} and {target.id} differ"
        raise InputError("one tokenizer, for this way of transfer", found, "use tokens or label-logits")


def _many_strings(source: LM, target: LM, train: Train) -> None:
    shared, least = token_strings(source).keys() & token_strings(target).keys(), 2 * target.width(HEAD)
    if len(shared) < least:
        found = f"{len(shared)} in {source.id} and {target.id}"
        raise InputError(f"at least {least} token strings in common, twice the width", found, "use label-logits")


def _labels_apart(source: LM, target: LM, train: Train) -> None:
    for lm in (source, target):
        ids = [tokens[0] for tokens in first_tokens(lm, _of_train(train))]
        if len(set(ids)) < 2:
            found = f"one for all outputs in {lm.id}"
            raise InputError("outputs with different first tokens, for label-logits", found, "use tokens")


Uses = Literal["target", "source"]
"""Whose zero-shot states a way is fitted on."""
WAYS: dict[str, tuple[Check, Callable[[Pair], Affine], Uses]] = {
    "direct": (_equal_widths, _direct, "target"),
    "difference": (_equal_widths, _difference, "source"),
    "conjugated": (_one_tokenizer, _conjugated, "source"),
    "aligned": (_one_tokenizer, _aligned, "target"),
    "tokens": (_many_strings, _tokens, "target"),
    "label-logits": (_labels_apart, _label_logits, "target"),
}


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transferred:
    """Rows of the target under its own methods and every way that the two models allow; the source's own rows; and
    why the other ways were left out."""

    results: Results
    source: Results
    left_out: dict[str, str]


def transfer(
    source: LM,
    target: LM,
    task: Task,
    ways: Sequence[str] = tuple(WAYS),
    *,
    seed: int = 0,
    **fields: Any,
) -> Transferred:
    """Every way that the two models allow, against the target's own zero-shot, few-shot, linear vector and a random
    vector (matched to the way that is best on dev). d_ntp is taken against the target's own few-shot, as in the paper.
    `fields`: `ridge`, `queries`. Raises `UnknownName` for a way that is none."""
    methods = [TransferTaskVector(way, **fields) for way in ways]
    for method in methods:
        method.check()
    left_out: dict[str, str] = {}
    with shared_work(source), shared_work(target):
        vectors = list[TaskVector]()
        for method in methods:
            try:
                WAYS[method.way][0](source, target, task.train)
            except TaskvecError as error:
                left_out[method.way] = str(error)
                continue
            vectors.append(method.fit(source, target, task.train, seed=seed))
        linear = LinearTaskVector(**fields)
        theirs, ours = (_rows_of(lm, task, linear, some, seed) for lm, some in ((source, []), (target, vectors)))
    return Transferred(ours, theirs, left_out)


def _rows_of(lm: LM, task: Task, linear: LinearTaskVector, vectors: Sequence[TaskVector], seed: int) -> Results:
    methods = (ZeroShot(), FewShot(), linear)
    own = [method.fit(lm, task.train, task.dev, seed=seed) for method in methods]
    reference = observe(lm, task.test, own[1])
    total = Results(())
    for vector in [*own, *vectors]:
        total += score_observed(lm, observe(lm, task.test, vector), vector, reference, seed=seed)
    if vectors:
        few = observe(lm, task.dev, own[1])
        scores = [dev_score(observe(lm, task.dev, vector), few) for vector in vectors]
        best = vectors[min(range(len(vectors)), key=lambda i: (-scores[i][0], scores[i][1]))]
        random = random_like(best, seed=seed)
        part = score_observed(lm, observe(lm, task.test, random), random, reference, seed=seed)
        total += matched(part, best, "transfer")
    return total
