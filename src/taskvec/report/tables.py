"""A run's tables, as cells; and as Markdown and LaTeX."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskvec.report import statistics
from taskvec.results import Metric, Row

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
    makers = (accuracy, closeness, costs, rank_table, tests, correlation_table, selected, failed)
    return [table for table in (make(run) for make in makers) if table.rows]


def accuracy(run: "Run") -> Table:
    """Accuracy by task and method, with the interval by item; and by seed in the last column, over all tasks."""
    rows = []
    for method in run.scored:
        hits = [run.hits(task, method) for task in run.tasks]
        whole = [h for h in hits if h.size]
        mean = f"{sum(float(h.mean()) for h in whole) / len(whole):.3f}" if whole else "-"
        cells = [said(statistics.by_item(h)) if h.size else "failed" for h in hits]
        rows.append((method, *cells, mean if len(whole) == len(hits) else f"{mean} of {len(whole)}"))
    caption = (
        "Accuracy on test items (label accuracy where a task has labels): mean over seeds, 95 % interval by item; "
        "the mean over tasks."
    )
    return Table("accuracy", caption, ("method", *run.tasks, "mean"), tuple(rows))


def closeness(run: "Run") -> Table:
    """Closeness to few-shot, means over seeds; and the spread over seeds."""
    body = []
    for task in run.tasks:
        for method in run.scored:
            rows, hits = run.rows_of(task, method), run.hits(task, method)
            if rows:
                names = ("d_ntp", "d_ntp_full", "agreement", "when_icl_wrong", "macro_f1", "in_label_rate")
                cells = [_mean_metric(rows, name) for name in names]
                body.append((task, method, said(statistics.by_seed(hits)), *cells, _mean_metric(rows, "accuracy")))
    header = ("task", "method", "accuracy by seed", "d_ntp", "d_ntp full", "agreement", "where few-shot is wrong")
    caption = (
        "Closeness to few-shot: accuracy with its 95 % interval over seeds, then means over seeds. "
        "Exact is the full-vocabulary answer."
    )
    return Table("closeness", caption, (*header, "macro F1", "in labels", "exact"), tuple(body), text=2)


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
        "Costs, means over tasks and seeds. `cell s` is what the cell took here, with work shared between methods."
    )
    return Table("costs", caption, header, tuple(body))


COSTS = {
    "fit_labels": "labels",
    "fit_queries": "queries",
    "fit_tokens": "fit tokens",
    "fit_seconds": "fit s",
    "prompt_tokens": "prompt tokens",
    "computed_tokens": "computed",
    "query_ms": "ms a query",
}


def rank_table(run: "Run") -> Table:
    """Mean ranks."""
    found = statistics.ranks(run)
    p = "" if found.p is None else f" Friedman's test that they differ: p = {found.p:.2g}."
    rows = tuple((method, f"{mean:.2f}") for method, mean in found.mean.items())
    return Table("ranks", f"Mean rank by accuracy over {found.tasks} tasks (1 is best).{p}", ("method", "rank"), rows)


def tests(run: "Run") -> Table:
    """Paired tests over all tasks together."""
    some = [test for test in statistics.paired_tests(run) if test.task == statistics.ALL]
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
        "Spearman's rho of d_ntp with accuracy over (method, seed) points but few-shot's, 95 % bootstrap interval."
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
    return Table("selected", "What was selected, on dev only.", ("task", "method", "seed", "selected"), tuple(rows), 4)


def failed(run: "Run") -> Table:
    """Cells without a result."""
    rows = tuple((f.task, f.method, str(f.seed), f.error) for f in run.failures)
    return Table("failed", "Cells that failed, with their errors.", ("task", "method", "seed", "error"), rows, 4)


def said(metric: Metric | None) -> str:
    """A metric in a cell."""
    return "-" if metric is None else f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"


def _mean_metric(rows: Sequence[Row], name: str) -> str:
    values = [getattr(row, name).value for row in rows if getattr(row, name) is not None]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _short(value: Any) -> bool:
    return not isinstance(value, list | dict) or (isinstance(value, list) and len(value) <= 6)


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
