"""The report as one HTML page that works offline: verdicts, tables, figures, and where they come from.

Everything that comes from a run is text: jinja2 escapes it, and figures are embedded as JSON without a "<".
"""

import re
import shlex
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from taskvec.errors import MissingPackage
from taskvec.report import figures, statistics, tables
from taskvec.report.drawing import Drawing
from taskvec.report.figures import joined
from taskvec.report.statistics import Paired, Ranks
from taskvec.report.tables import Table
from taskvec.results import CONTROL_SUFFIXES

if TYPE_CHECKING:
    from taskvec.report.read import Run

BASELINES = ("few-shot", "zero-shot", "mean-difference", "random")
LONG = 12
"""Tables with more rows than this are folded."""


def page(run: "Run") -> str:
    """The page. Raises `MissingPackage` where plotly or jinja2 is not installed."""
    script = plotly_script()
    return rendered("report.html.j2", **_content(run), plotly=script)


def plotly_script() -> str:
    """What draws the figures, to stand in a page. Raises `MissingPackage` where plotly is not installed."""
    script = str(_package("plotly.offline").get_plotlyjs())
    return script.replace("\r\n", "\n").replace("</script", "<\\/script")


def rendered(template: str, **values: Any) -> str:
    """A page from one of the templates, every value escaped. Raises `MissingPackage` where jinja2 is not installed."""
    jinja2 = _package("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: files("taskvec.report").joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"digest": _digest, "embedded": _embedded, "ticked": _ticked}
    return str(environment.get_template(template).render(**values))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        wanted = f"the package {name.split('.')[0]}, for report.html"
        raise MissingPackage(wanted, "it is not installed", 'run: pip install "taskvec[report]"') from None


def _digest(script: str) -> str:
    """A script as a content security policy names it: no other script runs on the page."""
    return f"'sha256-{b64encode(sha256(str(script).encode()).digest()).decode()}'"


def _embedded(figure: Any) -> str:
    """A figure as JSON that no HTML parser can take for markup."""
    text = str(figure.to_json())
    for character in "<>&\u2028\u2029":  # only strings hold these
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _ticked(text: str) -> Any:
    """Text with `words` in backticks as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _content(run: "Run") -> dict[str, Any]:
    made = [view(table) for table in tables.all_tables(run)]
    by_name = {table.name: table for table in made}
    return {
        "run": run,
        "suite": run.config["suite"],
        "facts": _facts(run),
        "summary": summary(run),
        "verdicts": _by_task(run),
        "unfinished": _unfinished(run),
        "accuracy": by_name.get("accuracy"),
        "tables": [table for table in made if table.name not in ("accuracy", "failed")],
        "key": _key(run),
        "charts": [drawing for drawing in (figures.closeness(run), figures.tokens(run)) if drawing],
        "groups": [group for group in _groups(run) if group.drawings],
        "data": _data(run),
        "model": _flat(run.config["model"]),
        "environment": _flat(run.environment),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "command": _command(run),
    }


# --- the verdict -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The run in one sentence, and what bears it."""

    lead: str
    details: tuple[str, ...] = ()


def summary(run: "Run") -> Summary:
    """Which method is best by mean rank, and from which baselines it differs clearly: what the tests say, no more."""
    ranks = statistics.ranks(run)
    if not ranks.mean:
        return Summary("No overall result: no task was finished by every method that has results.")
    if len(ranks.mean) == 1:
        return Summary(f"No comparison: only {next(iter(ranks.mean))} has results.")
    tests = statistics.paired_tests(run)
    best = _first(ranks, ranks.mean)
    told = _told(ranks, best)
    others = [f"{method}, mean rank {ranks.mean[method]:.2f}: {_standing(method, tests)}." for method in told]
    numbers = [_numbers(method, tests) for method in dict.fromkeys([*best, *told])]
    details = filter(None, (*others, *numbers, _friedman(ranks), MEANING))
    return Summary(_lead(run, ranks, best, tests), tuple(details))


MEANING = (
    "Clearly means a corrected p below 0.05 in a paired permutation test on the test items of all tasks, with all "
    "pairs of methods considered. It says nothing about other tasks, models, or demonstrations than these seeds'."
)


def _first(ranks: Ranks, among: Iterable[str]) -> list[str]:
    """The methods with the best mean rank; more than one where they tie."""
    some = {method: ranks.mean[method] for method in among}
    return [method for method, rank in some.items() if rank - min(some.values()) < 1e-9]


def _told(ranks: Ranks, best: list[str]) -> list[str]:
    """The methods that get a sentence of their own: those that tie, and the best one that is no baseline."""
    tied = best if len(best) > 1 else []
    others = [method for method in ranks.mean if method not in BASELINES]
    return [*tied, *(_first(ranks, others) if set(best) <= {*BASELINES} else [])]


def _lead(run: "Run", ranks: Ranks, best: list[str], tests: list[Paired]) -> str:
    share = "share the" if len(best) > 1 else "has the"
    over = f"over {_many(ranks.tasks, 'task')}"
    if ranks.tasks < len(run.tasks):
        over = f"over {ranks.tasks} of {len(run.tasks)} tasks, those that every method finished"
    among = f"{ranks.mean[best[0]]:.2f} among {len(ranks.mean)} methods"
    standing = f": {_standing(best[0], tests)}" if len(best) == 1 else ""
    return f"{joined(best)} {share} best mean rank ({among}) {over}{standing}."


def _against(method: str, tests: list[Paired]) -> dict[str, Paired]:
    """Each baseline's test against the method, turned so that the method comes first."""
    out = {}
    for test in tests:
        if test.a == method:
            out[test.b] = test
        elif test.b == method:
            out[test.a] = Paired(test.b, test.a, -test.difference, test.p, test.corrected)
    return {name: out[name] for name in BASELINES if name in out}


def _standing(method: str, tests: list[Paired]) -> str:
    """In words, from which baselines the method differs."""
    found = _against(method, tests)
    groups: dict[str, list[str]] = {}
    for name in BASELINES:
        if name != method:
            groups.setdefault(_relation(found.get(name)), []).append(name)
    return "; ".join(f"{words} {joined(groups[words])}" for words in RELATIONS if words in groups)


RELATIONS = ("clearly above", "clearly below", "not clearly different from", "not compared with")


def _relation(test: Paired | None) -> str:
    if test is None:
        return RELATIONS[3]
    if not test.clear:
        return RELATIONS[2]
    return RELATIONS[0] if test.difference > 0 else RELATIONS[1]


def _numbers(method: str, tests: list[Paired]) -> str:
    """The same in numbers; nothing where there was no test."""
    found = _against(method, tests)
    parts = [f"{100 * t.difference:+.1f} against {name} (p\u00a0=\u00a0{t.corrected:.2g})" for name, t in found.items()]
    return f"{method} in points of accuracy over all test items: {', '.join(parts)}." if parts else ""


def _friedman(ranks: Ranks) -> str:
    if ranks.p is None:
        return "The ranks themselves are not tested: that takes three methods, two tasks and a difference."
    differ = "the ranks differ" if ranks.p < statistics.ALPHA else "this does not show that the ranks differ"
    return f"Friedman's test of the ranks over {ranks.tasks} tasks gives p = {ranks.p:.2g}: {differ}."


def _by_task(run: "Run") -> list[tuple[str, str]]:
    """(task, its verdict without the task's name)."""
    sentences = iter(run.verdicts())
    out = []
    for task in run.tasks:
        judged = statistics.chosen(run, task) is not None
        said = next(sentences).sentence if judged else "no verdict: no candidate, or no random control, has a result."
        out.append((task, said.removeprefix(f"{task}: ")))
    return out


def _unfinished(run: "Run") -> str:
    """A line where the run is not complete."""
    whole = len(run.tasks) * len(run.config["methods"]) * len(run.config["seeds"])
    return f"{len(run.ledger)} of {whole} cells have been run." if len(run.ledger) < whole else ""


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text in two parts (a number, the rest), and the number it is sorted by."""

    main: str
    rest: str = ""
    value: float | None = None


@dataclass(frozen=True)
class View:
    """A table as the page shows it."""

    name: str
    caption: str
    header: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def long(self) -> bool:
        """Is it folded?"""
        return len(self.rows) > LONG


_NUMBER = re.compile(r"([+-]?(?:\d[\d,]*)(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s+(.*))?", re.DOTALL)


def view(table: Table) -> View:
    """A table's cells, with numbers to sort by in its number columns."""
    header = tuple((text, i >= table.text) for i, text in enumerate(table.header))
    rows = tuple(tuple(_cell(text, i >= table.text) for i, text in enumerate(row)) for row in table.rows)
    return View(table.name, table.caption, header, rows)


def _cell(text: str, number: bool) -> Cell:
    found = _NUMBER.fullmatch(text) if number else None
    if found is None:
        return Cell(text)
    return Cell(found[1], found[2] or "", float(found[1].replace(",", "")))


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """A method in the key of all figures. `number` is its traces' `meta`."""

    number: int
    method: str
    colour: str
    path: str
    open: bool


@dataclass(frozen=True)
class Group:
    """Small figures side by side."""

    title: str
    note: str
    drawings: tuple[Drawing, ...]


_PATHS = {
    "circle": "M7 0A7 7 0 1 1-7 0 7 7 0 1 1 7 0Z",
    "square": "M-6-6H6V6H-6Z",
    "diamond": "M0-8 8 0 0 8-8 0Z",
    "cross": "M-2.5-7H2.5V-2.5H7V2.5H2.5V7H-2.5V2.5H-7V-2.5H-2.5Z",
    "x": "M-7-3.5-3.5-7 0-3.5 3.5-7 7-3.5 3.5 0 7 3.5 3.5 7 0 3.5-3.5 7-7 3.5-3.5 0Z",
    "triangle-up": "M0-7 7 5H-7Z",
    "triangle-down": "M0 7 7-5H-7Z",
    "pentagon": "M0-7.5 7.1-2.3 4.4 6H-4.4L-7.1-2.3Z",
    "hexagon": "M0-7.5 6.5-3.75V3.75L0 7.5-6.5 3.75V-3.75Z",
    "star": "M0-8.5 2-2.8 8-2.6 3.2 1.1 5 6.9 0 3.5-5 6.9-3.2 1.1-8-2.6-2-2.8Z",
    "bowtie": "M-7-6 7 6V-6L-7 6Z",
}


def _key(run: "Run") -> list[Key]:
    marks = figures.marks(run.methods).items()
    return [
        Key(i, method, mark.colour, _PATHS[mark.symbol.removesuffix("-open")], mark.symbol.endswith("-open"))
        for i, (method, mark) in enumerate(marks)
    ]


def _groups(run: "Run") -> list[Group]:
    by_task = [figures.bars(run, task, i) for i, task in enumerate(run.tasks)] if run.scored else []
    by_layer = [figures.layers(run, task, i) for i, task in enumerate(run.tasks)]
    costs = [figures.cost(run, name) for name in figures.COSTS]
    dev = "The sweep each fit chose its layer from: accuracy on dev, mean over seeds. Layers from 0; head is its input."
    return [
        Group("Accuracy by task", "95 % intervals by test item; the dotted line is few-shot.", _there(by_task)),
        Group("Accuracy on dev by layer", dev, _there(by_layer)),
        Group("Costs of a fit", "Means over tasks and seeds.", _there(costs)),
    ]


def _there(drawings: Iterable[Drawing | None]) -> tuple[Drawing, ...]:
    return tuple(drawing for drawing in drawings if drawing is not None)


# --- where it comes from ---------------------------------------------------------------------------------------------


def _asked(run: "Run") -> list[str]:
    """The methods without baselines and controls."""
    beside = (*BASELINES, "few-shot-cached")
    return [name for name in run.config["methods"] if name not in beside and not name.endswith(CONTROL_SUFFIXES)]


def _facts(run: "Run") -> list[tuple[str, str]]:
    """What the title says."""
    methods = _asked(run)
    beside = _many(len(run.config["methods"]) - len(methods), "baseline or control", "baselines and controls")
    return [
        ("model", str(run.config["model"]["id"])),
        ("tasks", str(len(run.tasks))),
        ("methods", f"{len(methods)}, and {beside}"),
        ("seeds", ", ".join(map(str, run.config["seeds"]))),
        ("test items", _items(run)),
    ]


def _items(run: "Run") -> str:
    """How many test items there are, as scored; as configured where nothing was."""
    scored = {row.task: row.n for row in run.rows}
    counts = [scored.get(task, data["n_test"]) for task, data in run.config["tasks"].items()]
    low, high = min(counts), max(counts)
    return f"{sum(counts):,} ({low} a task)" if low == high else f"{sum(counts):,} ({low} to {high} a task)"


def _data(run: "Run") -> View:
    """What identifies each task's data."""
    rows = [(task, *(str(data.get(name, "-")) for name in DATA)) for task, data in run.config["tasks"].items()]
    header = ("task", "data", "format", "shots", "test items")
    return view(Table("data", "Tasks, and the hashes of their data and prompt format.", header, tuple(rows), text=3))


DATA = ("hash", "format", "shots", "n_test")


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as (name, value) lines."""
    if not isinstance(value, dict):
        return [(name, "-" if value is None else str(value))]
    return [line for key, inner in value.items() for line in _flat(inner, f"{name} {key}".strip())]


def _command(run: "Run") -> str:
    """The command that asks for this grid; empty where its seeds are not 0, 1, ... as the command counts them."""
    seeds = run.config["seeds"]
    if list(seeds) != list(range(len(seeds))):
        return ""
    names = _asked(run)
    asked = [part for name in names for part in ("--method", name)]
    words = ["taskvec", "bench", run.config["suite"]["name"], "--model", run.config["model"]["id"], *asked]
    return shlex.join([str(word) for word in (*words, "--seeds", len(seeds), "--out", "FOLDER")])


# --- words -----------------------------------------------------------------------------------------------------------


def _many(number: int, thing: str, things: str = "") -> str:
    return f"{number} {thing if number == 1 else things or thing + 's'}"
