"""A run's tables, as cells; and as Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskvec.report import statistics
from taskvec.results import Metric, Row, Values

if TYPE_CHECKING:
    from taskvec.report.read import Run


@dataclass(frozen=True)
class Table:
    """A caption, a header, and rows of text. The first `text` columns are words, the rest numbers."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 1


def all_tables(run: "Run") -> list[Table]:
    """Every table that has rows."""
    makers = (accuracy, by_group, closeness, costs, rank_table, tests, correlation_table, selected, failed)
    return [table for table in (make(run) for make in makers) if table.rows]


def accuracy(run: "Run") -> Table:
    """Accuracy by task and method, with the interval by item; the mean over tasks with one by task."""
    rows = []
    for method in run.scored:
        hits = [run.hits(task, method) for task in run.tasks]
        whole = [h for h in hits if h.size]
        cells = [_accuracy(run, task, method, h) for task, h in zip(run.tasks, hits, strict=True)]
        mean = said(statistics.by_task(whole)) if whole else "-"
        rows.append((method, *cells, mean if len(whole) == len(hits) else f"{mean} of {len(whole)}"))
    caption = (
        "Accuracy on test items (label accuracy where a task has labels): mean over seeds, 95 % interval by item; "
        "the mean over tasks with a 95 % t interval by task."
    )
    return Table("accuracy", caption, ("method", *run.tasks, "mean"), tuple(rows))


def by_group(run: "Run") -> Table:
    """Mean accuracy over the tasks of each category, and over seen and unseen tasks; no rows where there is but one
    group."""
    groups = _task_groups(run.config["tasks"])
    caption = "Mean accuracy over the tasks of a category, with a 95 % t interval by task (of one task: by item)."
    if len(groups) < 2:
        return Table("groups", caption, (), ())
    rows = [(method, *(_mean_over(run, method, some) for some in groups.values())) for method in run.scored]
    header = [f"{name} ({len(some)})" for name, some in groups.items()]
    return Table("groups", caption, ("method", *header), tuple(rows))


def _mean_over(run: "Run", method: str, tasks: list[str]) -> str:
    hits = [h for task in tasks if (h := run.hits(task, method)).size]
    return said(statistics.by_task(hits)) if hits else "failed"


def _task_groups(tasks: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Tasks by seen and unseen, and by category."""
    groups: dict[str, list[str]] = {}
    for task, data in tasks.items():
        where = {None: "", True: "unseen", False: "seen"}[data.get("unseen")]
        for name in filter(None, dict.fromkeys((where, f"{where} {data.get('category') or 'other'}".strip()))):
            groups.setdefault(name, []).append(task)
    return groups


def _accuracy(run: "Run", task: str, method: str, hits: Values) -> str:
    """A cell; it says where some of its seeds failed."""
    if not hits.size:
        return "failed"
    seeds = len(run.config["seeds"])
    return said(statistics.by_item(hits)) + ("" if len(hits) == seeds else f" ({len(hits)} of {seeds} seeds)")


def closeness(run: "Run") -> Table:
    """Closeness to few-shot, means over seeds; and the spread over seeds."""
    body = []
    for task in run.tasks:
        for method in run.scored:
            rows, hits = run.rows_of(task, method), run.hits(task, method)
            if rows:
                cells = [_mean_metric(rows, name) for name in CLOSE]
                far = run.d_ntp(task, method)
                shown = _mean_metric(rows, "d_ntp") if far is None else said(far)
                body.append((task, method, said(statistics.by_seed(hits)), shown, *cells))
    header = ("task", "method", "accuracy by seed", "d_ntp", *CLOSE.values())
    caption = (
        "Closeness to few-shot: accuracy with its 95 % interval over seeds, d_ntp with one by item, then means over "
        "seeds. Exact is the full-vocabulary answer; errors are mean squared distances to few-shot's label logits and "
        "last states; d_ntp stays below the bound."
    )
    return Table("closeness", caption, header, tuple(body), text=2)


CLOSE = {
    "d_ntp_full": "d_ntp full",
    "agreement": "agreement",
    "when_icl_wrong": "where few-shot is wrong",
    "macro_f1": "macro F1",
    "in_label_rate": "in labels",
    "accuracy": "exact",
    "label_logit_error": "label-logit error",
    "hidden_error": "hidden error",
    "d_ntp_bound": "d_ntp bound",
}


def costs(run: "Run") -> Table:
    """What each method costs to fit and to query, means over tasks and seeds."""
    body = []
    for method in run.methods:
        rows = [row for row in run.rows if row.method == method]
        names = (
            "fit_labels",
            "fit_queries",
            "fit_tokens",
            "fit_seconds",
            "prompt_tokens",
            "computed_tokens",
            "query_ms",
        )
        means = [statistics.mean_of(rows, name) for name in names]
        ledger = [entry["seconds"] for entry in run.ledger if entry["method"] == method]
        cell = f"{sum(ledger) / len(ledger):.1f}" if ledger else "-"
        body.append((method, *(f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.1f}" for mean in means), cell))
    header = ("method", "labels", "queries", "fit tokens", "fit s", "prompt tokens", "computed", "ms a query", "cell s")
    caption = (
        "Costs, means over tasks and seeds. `fit tokens` and `fit s` are billed as if the method stood alone; `cell s` "
        "is what the cell took here, with work shared between methods."
    )
    return Table("costs", caption, header, tuple(body))


def rank_table(run: "Run") -> Table:
    """Mean ranks."""
    found = statistics.ranks(run)
    p = "" if found.p is None else f" Friedman's test that they differ: p = {found.p:.2g}."
    rows = tuple((method, f"{mean:.2f}") for method, mean in found.mean.items())
    return Table("ranks", f"Mean rank by accuracy over {found.tasks} tasks (1 is best).{p}", ("method", "rank"), rows)


def tests(run: "Run") -> Table:
    """Paired tests over all tasks together."""
    some = statistics.paired_tests(run)
    rows = [(t.a, t.b, f"{100 * t.difference:+.1f}", f"{t.p:.2g}", f"{t.corrected:.2g}") for t in some]
    caption = (
        "Differences over all test items, in points. Paired permutation tests; corrected for all pairs "
        "(Benjamini and Yekutieli)."
    )
    return Table("tests", caption, ("method", "minus", "points", "p", "corrected p"), tuple(rows), text=2)


def correlation_table(run: "Run") -> Table:
    """d_NTP against accuracy."""
    rows = [(c.what, str(c.n), said(c.rho)) for c in statistics.correlations(run)]
    caption = (
        "Spearman's rho of d_ntp with accuracy over (method, seed) points but few-shot's. 95 % bootstrap intervals: of "
        "whole methods within a task, of whole tasks where they are pooled."
    )
    return Table("correlation", caption, ("points", "n", "rho"), tuple(rows))


def selected(run: "Run") -> Table:
    """What each fit chose on dev."""
    rows = []
    for row in run.rows:
        short = {name: value for name, value in row.found.items() if _short(value)}
        if row.matched is not None:
            short["matched"] = row.matched
        if short:
            said_ = ", ".join(f"{name} {_value(value)}" for name, value in short.items())
            rows.append((row.task, row.method, str(row.seed), said_))
    caption = "What each fit chose and measured; choices are made on dev, or on train (a ridge by leave-one-out)."
    return Table("selected", caption, ("task", "method", "seed", "selected"), tuple(rows), 4)


def failed(run: "Run") -> Table:
    """Cells without a result."""
    rows = tuple((f.task, f.method, str(f.seed), f.error) for f in run.failures)
    return Table("failed", "Cells that failed, with their errors.", ("task", "method", "seed", "error"), rows, 4)


def said(metric: Metric | None) -> str:
    """A metric in a cell."""
    return "-" if metric is None else f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def _mean_metric(rows: Sequence[Row], name: str) -> str:
    found = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    values = [one.value if isinstance(one, Metric) else one for one in found]
    mean = sum(values) / len(values) if values else 0.0
    return "-" if not values else f"{mean:.0f}" if mean >= 100 else f"{mean:.3f}"


def _short(value: Any) -> bool:
    return not isinstance(value, list | dict) or (isinstance(value, list) and len(str(value)) <= 120)


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- formats ---------------------------------------------------------------------------------------------------------

_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "\n": " "}
)


def markdown_tables(run: "Run") -> str:
    """All tables and the verdicts as Markdown."""
    verdicts = "\n".join(f"- {_md(verdict.sentence)}" for verdict in run.verdicts())
    return "\n\n".join([f"# {_md(run.config['suite']['name'])}", verdicts, *map(markdown, all_tables(run))]) + "\n"


def markdown(table: Table) -> str:
    """One table as Markdown."""
    lines = [table.header, ["---"] * table.text + ["--:"] * (len(table.header) - table.text), *table.rows]
    body = "\n".join("| " + " | ".join(map(_md, line)) + " |" for line in lines)
    return f"{table.caption}\n\n{body}"


_MD = re.compile(r"[\\`*<&|]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown would read as its own; not the underscore inside a word."""


def _md(text: str) -> str:
    return _MD.sub(r"\\\g<0>", " ".join(text.split()))


def latex_tables(run: "Run") -> str:
    """All tables as LaTeX, with booktabs' rules."""
    return "\n\n".join(map(latex, all_tables(run))) + "\n"


def latex(table: Table) -> str:
    """One table as LaTeX."""
    columns = "l" * table.text + "r" * (len(table.header) - table.text)
    lines = [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in (table.header, *table.rows)]
    lines = ["{}" + line if line.startswith(("[", "*")) else line for line in lines]  # else the line above takes it
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    top = f"\\begin{{table}}\n\\caption{{{table.caption.translate(_LATEX)}}}\n\\label{{tab:{table.name}}}"
    return f"{top}\n\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n\\end{{table}}"
