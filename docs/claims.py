"""docs/claims.md: what four papers claim, what the files in docs/results say about it, and a verdict by a rule.

A difference between methods is taken within each (task, seed), averaged over seeds, then over tasks; its interval is a
95 % t interval over tasks, for a claim is about tasks in general.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from tables import MODEL, RESULTS, analysed, markdown, read, row_of

from taskvec.report.statistics import POOLED, WITHIN, WRONG, over
from taskvec.results import SHUFFLED, TASK_MEAN, Metric, Row

YES, NO, UNSURE, NOT_HERE = "reproduced", "not reproduced", "undecided here", "not testable here"
STRONG = -0.5
"""Above this, a rank correlation is not called strong."""
MARGIN = 0.05
"""So far below few-shot still counts as reaching it."""


@dataclass(frozen=True)
class Found:
    """What was measured, and what follows."""

    measured: str
    verdict: str


@dataclass(frozen=True)
class Claim:
    """What a paper says, the figures it gives, and what finds out."""

    says: str
    figures: str
    find: Callable[[], Found]


# --- what was measured -----------------------------------------------------------------------------------------------


def suite() -> list[Row]:
    """The classification suite's rows: docs/benchmark."""
    return _rows("benchmark")


def tasks() -> list[Row]:
    """The rows of docs/methods/results.md: every method on four word tasks and two sets."""
    return [row for path in sorted(RESULTS.glob("methods_*.json")) for row in _rows(path.stem)]


def transferred() -> list[Row]:
    """The target's rows of every transfer from the larger model to the smaller one."""
    return [row for path in sorted(RESULTS.glob("transfer_down_*.json")) for row in _rows(path.stem)]


def _rows(name: str) -> list[Row]:
    return [Row.from_dict(row) for row in read(name)["rows"]]


def value(row: Row, key: str) -> float | None:
    """A metric or a plain number; `headline` is label accuracy where there are labels."""
    found: Any = getattr(row, key)
    return found.value if isinstance(found, Metric) else found


def difference(rows: Sequence[Row], a: str, b: Iterable[str], key: str) -> tuple[Metric, int]:
    """(a minus the mean of b, how many tasks)."""
    by = {(row.task, row.seed, row.method): value(row, key) for row in rows}
    others, per_task = list(b), dict[str, list[float]]()
    for (task, seed, method), own in by.items():
        theirs = [by.get((task, seed, other)) for other in others]
        if method == a and own is not None and None not in theirs:
            per_task.setdefault(task, []).append(own - float(np.mean(np.array(theirs, dtype=float))))
    if len(per_task) < 2:
        raise ValueError(f"{a} minus {others} was measured on {len(per_task)} tasks: a claim about tasks takes two")
    return over([float(np.mean(some)) for some in per_task.values()]), len(per_task)


def above(rows: Callable[[], list[Row]], a: str, b: Iterable[str], key: str = "headline") -> Callable[[], Found]:
    """Reproduced where the whole interval of a - b is above 0 (for a distance: below); undecided where it holds 0."""

    def find() -> Found:
        found, n = difference(rows(), a, b, key)
        low, high = (-found.high, -found.low) if key.startswith("d_ntp") else (found.low, found.high)
        named = " and ".join(f"`{other}`" for other in b)
        return Found(
            f"`{a}` minus {named}: {_said(found, key)}, {n} tasks", YES if low > 0 else NO if high < 0 else UNSURE
        )

    return find


def _said(found: Metric, key: str) -> str:
    if key.startswith("d_ntp"):
        return f"{key} {found.value:+.2f} nats [{found.low:+.2f}, {found.high:+.2f}]"
    return f"{100 * found.value:+.1f} points [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def both(*finds: Callable[[], Found]) -> Callable[[], Found]:
    """Reproduced where each part is, in part where some are; not where none is and one is known not to be."""

    def find() -> Found:
        found = [part() for part in finds]
        verdicts = [part.verdict for part in found]
        measured = "; ".join(dict.fromkeys(part.measured for part in found))
        if len(set(verdicts)) == 1:
            return Found(measured, verdicts[0])
        if YES in verdicts:
            return Found(measured, f"{YES} in part ({verdicts.count(YES)} of {len(found)})")
        return Found(measured, NO if NO in verdicts else UNSURE)

    return find


def not_here(reason: str) -> Callable[[], Found]:
    """What this scale, this data or this version cannot say."""
    return lambda: Found(reason, NOT_HERE)


def adapted(unseen: bool, b: Sequence[str]) -> Callable[[], Found]:
    """`adaptive` minus others on the tasks of its suite that were trained on, or were not."""
    if not (RESULTS / "adaptive_run.json").is_file():
        return not_here("not measured yet")
    found = read("adaptive_run")
    blank = {field.name: None for field in fields(Row)}
    rows = [Row.from_dict(blank | row) for row in found["rows"] if (row["task"] in found["unseen"]) == unseen]

    def find() -> Found:
        part = above(lambda: rows, "adaptive", b)()
        return Found(f"{'unseen' if unseen else 'seen'} tasks: {part.measured}", part.verdict)

    return find


Cell = tuple[str, str]
"""A model and a task of docs/analysis."""


def seen(says: str, gap: Callable[[Cell], float], least: float = 0.0) -> Callable[[], Found]:
    """A number of each model and task of docs/analysis, over these: reproduced where its interval is above `least`, not
    where it is below."""

    def find() -> Found:
        cells = [(model, task) for model in (MODEL, "gemma3-270m") for task in analysed(model)]
        if len(cells) < 2:
            return Found("not measured yet", NOT_HERE)
        found = over([gap(cell) for cell in cells])
        text = f"{says}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}], {len(cells)} pairs of model and task"
        verdict = YES if found.low > least else NO if found.high < least else UNSURE
        return Found(f"{text}; asked for: above {least:g}", verdict)

    return find


def _of(cell: Cell, name: str, **want: object) -> float:
    return row_of(*cell, name, want)[0]


def _path(cell: Cell, way: str, vector: str = "vector") -> float:
    return _of(cell, "early/ov", part="variants", way=way, vector=vector)


def _gain(cell: Cell) -> float:
    """The vector's own, over zero-shot."""
    return _path(cell, "itself") - _path(cell, "zero-shot")


def _share(cell: Cell) -> float:
    """What the OV path gives beyond random vectors' paths, of the vector's gain."""
    return (_path(cell, "ov") - _path(cell, "ov", "random vector")) / _gain(cell)


def _linear(cell: Cell) -> float:
    """What the Jacobian's image at the last layer gives beyond random vectors' images, of the vector's gain."""
    own, null = (
        _of(cell, "early/propagation", measure="accuracy", of=f"J {of} at the last layer") for of in ("v", "random")
    )
    return (own - null) / _gain(cell)


def _lost(cell: Cell) -> float:
    """What is lost without the key heads, beyond heads of the same layers, as a share of the accuracy with all."""
    key, random = "key heads", "random heads of the same layers"
    all_, out, null = (
        _of(cell, "early/heads", way="vector", heads=heads, percent=percent)
        for heads, percent in ((key, 0), (key, 10), (random, 10))
    )
    return (null - out) / all_


def _beyond(measure: str, name: str) -> Callable[[Cell], float]:
    """The vector's, less random vectors', at the vector's own layer."""

    def gap(cell: Cell) -> float:
        own, random = (_of(cell, name, measure=measure, of=of, own=True) for of in ("the vector", "random vectors"))
        return own - random

    return gap


# --- particular claims -----------------------------------------------------------------------------------------------


def tracks() -> Found:
    """Each task's own correlation, averaged over tasks; the pooled ones beside it."""
    rows = read("benchmark")
    found = {part["what"]: part for part in rows["correlations"] if part["rho"] is not None}
    tasks = list(dict.fromkeys(row["task"] for row in rows["rows"]))
    own = over([found[task]["rho"]["value"] for task in tasks if task in found])
    wrong = over([found[f"{task}, {WRONG}"]["rho"]["value"] for task in tasks if f"{task}, {WRONG}" in found])
    pooled = "; ".join(f"{name}: {Metric(**found[name]['rho'])}" for name in (POOLED, WITHIN))
    said = (
        f"Spearman's rho within a task, mean over tasks: {own}; on the items where few-shot is wrong: {wrong}; {pooled}"
    )
    return Found(said, YES if own.high < STRONG else NO if own.low > STRONG else UNSURE)


def bounded() -> Found:
    """d_ntp <= label_logit_error / 4 <= d_ntp_bound in every row that has them."""
    rows = [row for row in [*suite(), *tasks()] if row.d_ntp and row.label_logit_error and row.d_ntp_bound is not None]
    held = sum(row.d_ntp.value <= row.label_logit_error.value / 4 <= row.d_ntp_bound for row in rows)
    share = np.median([row.d_ntp.value / row.d_ntp_bound for row in rows if row.d_ntp_bound])
    text = f"d_ntp <= label-logit error / 4 <= the bound from the hidden error in {held} of {len(rows)} rows"
    return Found(f"{text}; d_ntp is {share:.1g} of the bound (median)", YES if held == len(rows) else NO)


def cheap() -> Found:
    """Seconds to fit and to ask, against the trained vector in the same group: log ratios, over tasks."""
    by = {(row.task, row.seed, row.method): row for row in suite()}
    groups = [key[:2] for key in by if key[2] == "linear" and (*key[:2], "learned") in by]
    said = list[Metric]()
    for key in ("fit_seconds", "query_ms"):
        logs = {task: list[float]() for task, _ in groups}
        for task, seed in groups:
            learned, linear = (getattr(by[task, seed, name], key) for name in ("learned", "linear"))
            logs[task].append(float(np.log(learned / linear)))
        found = over([float(np.mean(some)) for some in logs.values()])
        said.append(Metric(*(float(np.exp(x)) for x in (found.value, found.low, found.high))))
    fit, ask = (f"{m.value:.2f} [{m.low:.2f}, {m.high:.2f}]" for m in said)
    text = f"`learned` takes {fit} times as long to fit and {ask} times as long a query, {len(logs)} tasks"
    return Found(text, YES if said[0].low > 1 else NO if said[0].high < 1 else UNSURE)


def beats_icl() -> Found:
    """Not more than `MARGIN` below few-shot."""
    found, n = difference(tasks(), "learned", ["few-shot"], "accuracy")
    text = f"`learned` minus `few-shot`: {_said(found, 'accuracy')}, {n} tasks"
    return Found(text, YES if found.low > -MARGIN else NO if found.high < 0 else UNSURE)


def regressed(test: str, a: str, b: str) -> Metric:
    """The squared error of a minus that of b, over learners (or classes of functions) and seeds."""
    rows = [row for row in read("regression")["rows"] if row["test"] == test]
    by = {(row["learner"], row["function"], row["seed"], row["method"]): row["mse"]["value"] for row in rows}
    return over([value - by[(*key, b)] for (*key, method), value in by.items() if method == a])


def lower_error(test: str, a: str, *others: str) -> Callable[[], Found]:
    """Reproduced where a's error is below each of the others'."""

    def part(b: str) -> Found:
        if not any(row["test"] == test for row in read("regression")["rows"]):
            return Found("not measured yet", NOT_HERE)
        found = regressed(test, a, b)
        text = f"`{a}` minus {b}: mse {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        return Found(text, YES if found.high < 0 else NO if found.low > 0 else UNSURE)

    return lambda: both(*((lambda b=b: part(b)) for b in others))()


def carries(method: str) -> Found:
    """Task fidelity behind no examples and behind other functions' examples: 0 is no task, 1 is the examples."""
    rows = [row for row in read("regression")["rows"] if row["method"] == method and row["fidelity"]]
    found = over([row["fidelity"]["value"] for row in rows])
    text = f"task fidelity of `{method}` {found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}] ({len(rows)} rows)"
    return Found(text, YES if found.low > 0.5 else NO if found.high < 0.5 else UNSURE)


BASELINES = ("hendel", "function-vector", "mean-difference")
PAPERS: dict[str, list[Claim]] = {
    "Linear task vector (arXiv 2605.20730)": [
        Claim("d_NTP and accuracy are strongly and negatively correlated", "no coefficient known", tracks),
        Claim(
            "The ridge map lowers d_NTP below other task vectors",
            "no figures known",
            both(*(above(suite, "linear", [name], "d_ntp") for name in (*BASELINES, "learned"))),
        ),
        Claim(
            "It gains accuracy over task-vector baselines on eight classification sets and five models",
            "+9.2 % on average (points or relative: unknown)",
            above(suite, "linear", BASELINES),
        ),
        Claim(
            "A linear map is better than one constant vector, the mean difference",
            "no figures known",
            both(above(suite, "linear", ["mean-difference"]), above(suite, "linear", ["mean-difference"], "d_ntp")),
        ),
        Claim("Closeness of states bounds d_NTP", "constants unknown; the bound here is ours", bounded),
        Claim("It costs less to fit than trained vectors", "0.3 min against 7.1 (8B, 8 bit)", cheap),
        Claim(
            "A larger model's vector improves a smaller model",
            "+6.4 % (unit, pair and reference unknown)",
            both(
                above(transferred, "transfer-tokens", ["zero-shot"]),
                above(transferred, "transfer-label-logits", ["zero-shot"]),
                above(transferred, "transfer-tokens", ["linear"]),
            ),
        ),
        Claim(
            "It beats the baselines in regression from text",
            "no figures",
            lower_error("text", "linear", "mean-difference", "zero-shot", "few-shot", "zero"),
        ),
    ],
    "Adaptive task vectors (arXiv 2506.03426)": [
        Claim(
            "A vector written for each query is above few-shot, ELICIT, I2CL and LoRA on average, on unseen tasks too",
            "20 tasks in domain, 5 unseen; values unknown",
            both(*(adapted(unseen, [name]) for unseen in (False, True) for name in ("few-shot", "lora"))),
        ),
        Claim(
            "It is the query that the vector is written for which helps",
            "no control (ours: the vectors of the task's other queries; its mean)",
            both(*(adapted(unseen, [f"adaptive{end}"]) for unseen in (False, True) for end in (SHUFFLED, TASK_MEAN))),
        ),
        Claim(
            "On HANS it answers where nobody else does",
            "59.6 % against less than 0.5 %",
            not_here("HANS cannot be had offline"),
        ),
    ],
    "Learned task vectors (arXiv 2509.24169)": [
        Claim(
            "A trained vector is far above extracted ones, counted over the full vocabulary",
            "83.5 against 37.8 (mean difference) and 37.3 (function vector), Llama-3.1-8B",
            both(*(above(tasks, "learned", [name], "accuracy") for name in ("mean-difference", "function-vector"))),
        ),
        Claim("It reaches few-shot", "equal or above it from early layers", beats_icl),
        Claim(
            "As a way of fine-tuning it is above LoRA and prefix tuning",
            "SST-2: 92.9 against 91.6 and 85.7 (here both rivals are bounded to about a minute of training)",
            both(*(above(tasks, "learned", [name], "accuracy") for name in ("lora", "prefix-tuning"))),
        ),
        Claim(
            "It acts through OV circuits",
            "OV alone keeps 52 of 83",
            seen("what the OV path alone gives beyond random vectors' paths, of the vector's gain", _share),
        ),
        Claim(
            "A tenth of the heads carries it",
            "51 of 83 without them (78 without random ones)",
            seen("lost without key heads, beyond heads of the same layers, as a share", _lost),
        ),
        Claim(
            "It propagates almost linearly",
            "figures only",
            both(
                seen(
                    "accuracy by the Jacobian's image at the last layer beyond random vectors' images, of the gain",
                    _linear,
                ),
                seen(
                    "R² of the mean Jacobian at the vector's layer",
                    lambda cell: _of(cell, "early/propagation", measure="R2", by="J, the vector", own=True),
                ),
            ),
        ),
        Claim(
            "Early vectors are rotated towards the task",
            "figures only",
            seen(
                "share in the span of the outputs once rotated, less rotated random vectors'",
                _beyond("alignment of Qv", "early/rotation"),
            ),
        ),
        Claim(
            "Late vectors are only stretched",
            "figures only",
            both(
                seen("cos(v, Qv) of a late vector, less random vectors'", _beyond("cos(v, Qv)", "late/rotation")),
                seen("its stretch, less random vectors'", _beyond("|Sv| / |v|", "late/rotation")),
            ),
        ),
    ],
    "Learnable task vector (arXiv 2502.05390)": [
        Claim(
            "A trained weighted sum of heads is above the function vector on text",
            "15 tasks, GPT-J-6B; main tables unknown",
            above(tasks, "learnable", ["function-vector"], "accuracy"),
        ),
        Claim(
            "In regression it carries on where prompts are longer than those trained on",
            "error 1.1 against 13.5 at 100 examples",
            lower_error("length", "learnable", "vanilla", "function-vector", "icv", "constant"),
        ),
        Claim("What it adds there represents the function", "as its title says", lambda: carries("learnable")),
    ],
}


def claims() -> str:
    """A table a paper."""
    parts = []
    for paper, its in PAPERS.items():
        body = []
        for claim in its:
            found = claim.find()
            body.append([claim.says, claim.figures, found.measured, f"**{found.verdict}**"])
        parts.append(f"## {paper}\n\n" + markdown(["claim", "what they said", "what we measured", "verdict"], body))
    return "\n" + "\n\n".join(parts) + "\n"
