"""docs/claims.md: what four papers claim, what the files in docs/results say about it, and a verdict (verdicts.py)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tables import markdown, read
from verdicts import (
    MARGIN,
    NO,
    NOT_HERE,
    STRONG,
    UNSURE,
    YES,
    Found,
    above,
    adapted,
    both,
    by_jacobian,
    by_ov,
    difference,
    difference_said,
    late_cosine,
    lost,
    needs_ov,
    not_here,
    number,
    seen,
    suite,
    tasks,
    transferred,
    turned,
)

from taskvec.report.statistics import POOLED, WITHIN, WRONG, over
from taskvec.results import SHUFFLED, TASK_MEAN, Metric


@dataclass(frozen=True)
class Claim:
    """What a paper says, the figures it gives, and what finds out."""

    says: str
    figures: str
    find: Callable[[], Found]


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
    text = f"`learned` minus `few-shot`: {difference_said(found, 'accuracy')}, {n} tasks"
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
            both(
                seen("accuracy by the OV path alone, less by random vectors' paths", by_ov),
                seen("lost without it, beyond without random vectors' paths", needs_ov),
            ),
        ),
        Claim(
            "A tenth of the heads carries it",
            "51 of 83 without them (78 without random ones)",
            seen("accuracy lost without key heads, beyond without heads of the same layers", lost),
        ),
        Claim(
            "It propagates almost linearly",
            "figures only",
            both(
                seen("accuracy by the mean Jacobian's image at the last layer, less by a random vector's", by_jacobian),
                seen(
                    "R² of the mean Jacobian at the vector's layer",
                    lambda cell: number(cell, "early/propagation", measure="R2", by="J, the vector", own=True),
                    0.5,
                ),
            ),
        ),
        Claim(
            "Early vectors are rotated towards the task",
            "figures only",
            seen("share in the span of the outputs that rotation adds, beyond what it adds to random vectors", turned),
        ),
        Claim(
            "Late vectors are only stretched",
            "figures only",
            seen("cos(v, Qv) of a late vector", late_cosine, 0.9),
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
