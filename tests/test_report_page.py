"""report.html: one page that works offline, says what the tests bear, and shows hostile text as text."""

import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from taskvec.errors import MissingPackage
from taskvec.report import drawing, figures, statistics, tables
from taskvec.report.page import _PATHS, BASELINES, _embedded, page, summary, view
from taskvec.report.read import Failure, Run
from taskvec.report.tables import Table
from taskvec.results import Metric, Row

HOSTILE = '</script><img src=x onerror="document.documentElement.dataset.ran=1">'
TASKS = ["antonym", "country_capital", "english_french", "gerund", "past_tense", "reviews", "sst2"]
SKILLS = {
    "few-shot": 0.85,
    "zero-shot": 0.1,
    "mean-difference": 0.4,
    "random": 0.08,
    "hendel": 0.45,
    "function-vector": 0.5,
    "linear": 0.7,
    "linear-shuffled": 0.3,
    "learned": 0.95,
}
LABELLED = ("reviews", "sst2")


# --- runs ------------------------------------------------------------------------------------------------------------


def _row(method: str, task: str, seed: int, hits: list[bool]) -> Row:
    share, noise = sum(hits) / len(hits), (len(method) * 7 + len(task) * 3 + seed) % 11 / 10
    metric = Metric(share, max(0.0, share - 0.1), min(1.0, share + 0.1))
    layers = 13 if method == "mean-difference" else 12
    found = {"dev_accuracy": [share * np.exp(-((i - 5) ** 2) / 20) for i in range(layers)], "layer": 5}
    return Row(
        method,
        task,
        seed,
        len(hits),
        matched="learned" if method == "random" else None,
        accuracy=metric,
        label_accuracy=metric if task in LABELLED else None,
        d_ntp=Metric(0.0, 0.0, 0.0) if method.startswith("few-shot") else Metric(1.05 - share + noise, 0.0, 3.0),
        fit_labels=0 if method == "zero-shot" else 10,
        fit_seconds=60 * share if method == "learned" else 0.2,
        prompt_tokens=120.0 if method.startswith("few-shot") else 8.0,
        computed_tokens=5.0 if method == "few-shot-cached" else 120.0 if method == "few-shot" else 8.0,
        query_ms=3.0,
        found=found if method in figures.LAYERED else {"steps": 120},
    )


def _config(tasks: list[str], methods: list[str], seeds: list[int], n: int) -> dict[str, Any]:
    data = {"hash": "6d10110a5e8e8ac", "format": "3981de3ffabd", "shots": 10, "n_test": n}
    return {
        "format_version": 1,
        "taskvec": "0.1.0",
        "model": {"id": "smollm2-135m", "revision": None, "fingerprint": "51b2892f436d", "dtype": "torch.float32"},
        "suite": {"name": "words", "description": "Word tasks, `ten` shots.", "shots": 10},
        "tasks": {task: dict(data) for task in tasks},
        "methods": {method: {} for method in methods},
        "seeds": seeds,
    }


def make_run(
    tasks: list[str],
    skills: dict[str, float],
    seeds: list[int],
    failures: tuple[Failure, ...] = (),
    n: int = 12,
) -> Run:
    """A run whose methods are right with the given probabilities. Cells named in `failures` have no rows."""
    rng = np.random.default_rng(0)
    lost = {(f.task, f.method, f.seed) for f in failures}
    rows, records, ledger = list[Row](), list[dict[str, Any]](), list[dict[str, Any]]()
    for task, seed, method in ((t, s, m) for t in tasks for s in seeds for m in skills):
        ledger.append({"task": task, "method": method, "seed": seed, "tokens": 100, "passes": 3, "seconds": 0.5})
        if (task, method, seed) in lost:
            continue
        hits = [bool(hit) for hit in rng.random(n) < skills[method]]
        names = [method, "few-shot-cached"] if method == "few-shot" else [method]
        rows += [_row(name, task, seed, hits) for name in names]
        labels = hits if task in LABELLED else [None] * n
        same = {"method": method, "task": task, "seed": seed}
        records += [same | {"correct": c, "label_correct": b} for c, b in zip(hits, labels, strict=True)]
    schema = {"method": pl.String, "task": pl.String, "seed": pl.Int64, "correct": pl.Boolean}
    examples = pl.DataFrame(records, schema={**schema, "label_correct": pl.Boolean})
    environment = {"packages": {"taskvec": "0.1.0", "torch": None}, "python": "3.11.7", "cores": 2}
    return Run(
        Path("run"),
        _config(tasks, list(skills), seeds, n),
        environment,
        tuple(rows),
        failures,
        tuple(ledger),
        examples if records else examples.select("method", "task", "seed"),
    )


@cache
def rich_run() -> Run:
    """Seven tasks, nine methods, three seeds, and failed cells: a seed of one method, all of another."""
    failures = [Failure("gerund", "hendel", 1, "wanted a site; found none; name another")]
    failures += [Failure("sst2", "function-vector", seed, "RuntimeError: out of memory") for seed in range(3)]
    return make_run(TASKS, SKILLS, [0, 1, 2], tuple(failures))


@cache
def hostile_run() -> Run:
    """Names and errors that would run, close a script, open a tag, or be a template, if anything let them."""
    tasks = [HOSTILE, "<b>bold</b> & <i>slanted", '"%{x}"{{ 7 * 7 }}\'<!--', "$x^2$"]
    skills = {**SKILLS, HOSTILE + "m": 0.5, "`<u>`": 0.4}
    run = make_run(tasks, skills, [0, 1], (Failure(tasks[1], "hendel", 0, f"ValueError: {HOSTILE}"),))
    run.config["suite"] |= {"name": HOSTILE, "description": f"`{HOSTILE}`"}
    run.config["model"]["id"] = HOSTILE
    run.environment["system"] = HOSTILE
    return run


@pytest.fixture(autouse=True, scope="module")
def _quick_tests() -> Iterator[None]:
    """Few resamples, and each run tested once: what the tests say is not the matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "enough", lambda pairs: 199)
        yield


@pytest.fixture(scope="module")
def rich() -> str:
    return page(rich_run())


@pytest.fixture(scope="module")
def hostile() -> str:
    return page(hostile_run())


class _Outline(HTMLParser):
    """Tags opened and closed in order, attributes that load something, and the text outside of scripts."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open = list[str]()
        self.wrong = list[str]()
        self.tags = list[tuple[str, dict[str, str | None]]]()
        self.text = ""
        self.data = dict[str, Any]()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and tag != "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        attrs = self.tags[-1][1] if self.tags else {}
        if self.open[-1:] == ["script"] and attrs.get("type") == "application/json":
            self.data[str(attrs["id"])] = json.loads(data)
        elif self.open[-1:] not in (["script"], ["style"]):
            self.text += data

    def values(self, *names: str) -> list[str]:
        """The values of these attributes, on any tag."""
        return [str(value) for _, attrs in self.tags for name, value in attrs.items() if name in names]


def _words(text: str) -> str:
    return " ".join(text.split())


# --- the page's parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["rich", "hostile"])
def test_the_page_is_well_formed_and_loads_nothing(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    outline = _Outline(text)
    assert not outline.wrong
    assert not outline.open
    loads = outline.values("src", "href", "action", "data", "poster", "srcset")
    assert loads
    assert all(value == "data:," or value.startswith("#") for value in loads)
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    policy = next(str(attrs["content"]) for _, attrs in outline.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert policy.count("'sha256-") == 2
    assert "unsafe-inline' 'sha" not in policy.split("script-src")[1]
    assert text.count("plotly.js v") == 1
    assert not [value for name in ("onclick", "onerror", "onload") for value in outline.values(name)]


def test_every_task_method_and_failure_is_there(rich: str) -> None:
    run, outline = rich_run(), _Outline(rich)
    text = _words(outline.text)
    for word in ("words", "smollm2-135m", "0, 1, 2", "84 (12 a task)", *TASKS, *SKILLS, "few-shot-cached"):
        assert word in text
    assert "4 of 189 cells failed" in text
    for failure in run.failures:
        assert f"{failure.task} · {failure.method} · seed {failure.seed}" in text
        assert failure.error in text
    for verdict in run.verdicts():
        assert verdict.sentence.split(": ", 1)[1] in text
    assert text.index("Verdict") < text.index(summary(run).lead) < text.index("cells failed")
    found = tables.all_tables(run)
    assert len(found) == 8
    for table in found:
        assert table.name == "failed" or _words(table.caption.replace("`", "")) in text
        assert all(_words(cell) in text for row in table.rows for cell in row)


def test_where_it_comes_from_is_there(rich: str) -> None:
    text = _words(_Outline(rich).text)
    for word in ("packages torch", "51b2892f436d", "6d10110a5e8e8ac", "3981de3ffabd", "format_version: 1", "3.11.7"):
        assert word in text
    methods = "--method hendel --method function-vector --method linear --method learned"
    assert f"taskvec bench words --model smollm2-135m {methods} --seeds 3 --out FOLDER" in text


def test_a_command_that_cannot_be_said_is_not_said() -> None:
    run = make_run(["gerund"], SKILLS, [3, 5])
    assert "taskvec bench" not in _Outline(page(run)).text


def test_hostile_text_is_text(hostile: str) -> None:
    run, outline = hostile_run(), _Outline(hostile)
    assert "img" not in {tag for tag, _ in outline.tags}
    assert not {"b", "i", "u"} & {tag for tag, attrs in outline.tags if attrs}
    text = _words(outline.text)
    for word in (*run.tasks, *run.methods, run.failures[0].error, "$x^2$"):
        assert _words(word) in text
    assert hostile.count("<script") == hostile.count("</script>") == 2 + len(outline.data) + hostile_in_plotly()
    assert "<b>bold" not in hostile


def hostile_in_plotly() -> int:
    """How often plotly.js itself says what a count of tags takes for one."""
    import plotly.offline

    return int(plotly.offline.get_plotlyjs().count("<script"))


def test_no_string_in_a_figure_is_markup(hostile: str) -> None:
    data = _Outline(hostile).data
    assert len(data) == 2 + 4 + 4 + 2
    run = hostile_run()
    allowed = re.compile(r"</?b>|<br>|<extra></extra>")
    for name, figure in data.items():
        for text in _strings(figure):
            assert "<" not in allowed.sub("", text), (name, text)
    shown = {text for figure in data.values() for text in _strings(figure["data"])}
    assert {drawing.plain(name) for name in (*run.tasks, *run.methods)} <= shown


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(inner)


@pytest.mark.parametrize("text", ["a\n b", "<a>&", "</script>", "é\u2028"])
def test_plain_is_one_line_without_markup(text: str) -> None:
    assert not {"<", ">", "\n", "\u2028"} & {*drawing.plain(text)}
    assert html.unescape(drawing.plain(text)) == _words(text)


def test_embedded_figures_hold_no_markup() -> None:
    class Figure:
        def to_json(self) -> str:
            return json.dumps({"a": "</script><!--&\u2028"}, ensure_ascii=False)

    text = _embedded(Figure())
    assert not {"<", ">", "&", "\u2028"} & {*text}
    assert json.loads(text) == {"a": "</script><!--&\u2028"}


def test_charts_have_texts_for_those_who_do_not_see_them(rich: str) -> None:
    outline = _Outline(rich)
    images = [attrs for _, attrs in outline.tags if attrs.get("role") == "img"]
    assert len(images) == len(outline.data) == 2 + 7 + 7 + 2
    assert all(str(attrs["aria-label"]).endswith(".") for attrs in images)
    assert all(_words(str(attrs["aria-label"])) in _words(outline.text) for attrs in images)


def test_headers_sort_by_key_and_say_how(rich: str) -> None:
    tags = _Outline(rich).tags
    heads = [i for i, (tag, attrs) in enumerate(tags) if tag == "th" and attrs.get("scope") == "col"]
    assert heads
    for i in heads:
        assert tags[i][1]["aria-sort"] == "none"
        assert tags[i + 1] == ("button", {"type": "button"})


@pytest.mark.parametrize(
    ("text", "main", "rest", "value"),
    [
        ("0.125 [0.000, 0.250]", "0.125", "[0.000, 0.250]", 0.125),
        ("1,796", "1,796", "", 1796.0),
        ("+4.2", "+4.2", "", 4.2),
        ("-0.885 [-0.9, 1.0]", "-0.885", "[-0.9, 1.0]", -0.885),
        ("2.2e-07", "2.2e-07", "", 2.2e-07),
        ("0.491 of 6", "0.491", "of 6", 0.491),
        ("failed", "failed", "", None),
        ("-", "-", "", None),
        ("nan", "nan", "", None),
        ("3981de3ffabd", "3981de3ffabd", "", None),
    ],
)
def test_cells_are_sorted_by_their_number(text: str, main: str, rest: str, value: float | None) -> None:
    shown = view(Table("t", "", ("words", "numbers"), ((text, text),)))
    assert [cell.value for cell in shown.rows[0]] == [None, value]
    assert (shown.rows[0][1].main, shown.rows[0][1].rest) == (main, rest)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_the_summary_says_what_the_tests_say() -> None:
    run = rich_run()
    found = summary(run)
    tests = {(t.a, t.b): t for t in statistics.paired_tests(run)}
    assert found.lead.startswith("learned has the best mean rank")
    assert "over 6 of 7 tasks" in found.lead
    words = found.lead.split(": ")[1].removesuffix(".")
    said = {name: part for part in words.split("; ") for name in BASELINES if name in part}
    assert said.keys() == {*BASELINES}
    for name, part in said.items():
        assert part.startswith("clearly above") == tests[name, "learned"].clear


def test_no_difference_is_claimed_where_there_is_none() -> None:
    run = make_run(TASKS[:3], dict.fromkeys(SKILLS, 0.5), [0])
    found = summary(run)
    assert "clearly above" not in found.lead
    assert "clearly below" not in " ".join(found.details[:-1])
    assert "this does not show that the ranks differ" in " ".join(found.details)


def test_a_baseline_that_is_best_is_said_to_be_and_the_best_method_follows() -> None:
    run = make_run(TASKS[:3], {"few-shot": 1.0, "zero-shot": 0.0, "random": 0.0, "linear": 0.5}, [0, 1])
    found = summary(run)
    assert found.lead.startswith("few-shot has the best mean rank (1.00 among 4 methods) over 3 tasks")
    assert "clearly above zero-shot and random; not compared with mean-difference" in found.lead
    assert found.details[0].startswith("linear, mean rank 2.00: clearly above zero-shot and random; clearly below few")


def test_ties_are_shared() -> None:
    found = summary(make_run(TASKS[:2], {"few-shot": 1.0, "zero-shot": 0.0, "linear": 1.0}, [0]))
    assert found.lead == "few-shot and linear share the best mean rank (1.50 among 3 methods) over 2 tasks."
    assert "not clearly different from few-shot" in " ".join(found.details)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_all_points_are_drawn_each_method_in_its_own_mark() -> None:
    run = rich_run()
    drawing = figures.closeness(run)
    assert drawing is not None
    assert sum(len(trace.x) for trace in drawing.figure.data) == len(statistics.points(run)) == 8 * 7 * 3 - 4
    rho = next(c.rho for c in statistics.correlations(run) if c.what == "pooled")
    assert rho is not None
    assert f"{rho.value:.2f} [{rho.low:.2f}, {rho.high:.2f}]" in drawing.says
    seen = {trace.meta: (trace.marker.color, trace.marker.symbol) for trace in drawing.figure.data}
    marks = figures.marks(run.methods)
    assert seen == {i: (marks[m].colour, marks[m].symbol) for i, m in enumerate(run.methods)}


def test_a_cached_prefix_stands_at_what_it_computes() -> None:
    run = rich_run()
    drawing = figures.tokens(run)
    assert drawing is not None
    assert drawing.figure.layout.xaxis.type == "log"
    at = {run.methods[trace.meta]: trace.x[0] for trace in drawing.figure.data}
    assert (at["few-shot"], at["few-shot-cached"]) == (120, 5)
    assert at["linear"] == pytest.approx(8, rel=0.25)
    assert "few-shot reads 120 on average; behind a cached prefix it computes 5" in drawing.says


def test_bars_are_the_tables_numbers() -> None:
    run = rich_run()
    drawing = figures.bars(run, "sst2")
    shown = {run.methods[t.meta]: t for t in drawing.figure.data if t.type == "bar"}
    assert shown.keys() == {*SKILLS} - {"function-vector"}
    for method, bar in shown.items():
        metric = statistics.by_item(run.hits("sst2", method))
        assert bar.x[0] == metric.value
        assert bar.x[0] + bar.error_x.array[0] == pytest.approx(metric.high)
        assert bar.x[0] - bar.error_x.arrayminus[0] == pytest.approx(metric.low)
    assert "failed" in [text for trace in drawing.figure.data if trace.type == "scatter" for text in trace.text]


def test_layer_curves_are_means_over_seeds_and_the_heads_input_is_no_layer() -> None:
    run = rich_run()
    drawing = figures.layers(run, "gerund")
    assert drawing is not None
    lines = {run.methods[trace.meta]: trace for trace in drawing.figure.data if trace.mode == "lines+markers"}
    for method, line in lines.items():
        curves = [row.found["dev_accuracy"] for row in run.rows_of("gerund", method)]
        assert len(curves) == (2 if method == "hendel" else 3)
        assert list(line.x) == list(range(12))
        assert list(line.y) == pytest.approx(np.mean(curves, axis=0)[:12])
    (head,) = (trace for trace in drawing.figure.data if trace.mode == "markers")
    assert run.methods[head.meta] == "mean-difference"
    assert drawing.figure.layout.xaxis.ticktext[-1] == "head"
    assert "mean-difference at layer 5" in drawing.says


def test_a_layer_that_was_given_makes_no_curve() -> None:
    row = _row("hendel", "gerund", 0, [True])
    row.found["dev_accuracy"] = [0.5]
    run = make_run(["gerund"], {"few-shot": 1.0}, [0])
    assert figures.layers(Run(run.path, run.config, {}, (row,), (), (), run.examples), "gerund") is None


def test_costs_say_who_takes_most() -> None:
    seconds, labels = (figures.cost(rich_run(), name) for name in figures.COSTS)
    assert seconds is not None
    assert labels is not None
    assert seconds.says.startswith("Most: learned with ")
    assert labels.says.endswith("none: zero-shot.")


def test_marks_are_fixed_and_told_apart() -> None:
    known = [*figures._MARKS, "few-shot-cached", "linear-shuffled", "learned-shuffled", "a", "b"]
    found = figures.marks(known)
    assert len({(mark.colour, mark.symbol) for mark in found.values()}) == len(known)
    assert figures.marks(["b", "linear", "zero-shot"])["linear"] == found["linear"]
    assert found["linear-shuffled"] == figures.Mark(found["linear"].colour, "pentagon-open")
    assert {mark.symbol.removesuffix("-open") for mark in found.values()} <= {*_PATHS}


# --- colours ---------------------------------------------------------------------------------------------------------


def _themes() -> list[dict[str, str]]:
    """The light and the dark colours by name."""
    source = files("taskvec.report").joinpath("base.html.j2").read_text("utf-8")
    dark = source[source.index("{% set dark %}") :].split("{% endset %}")[0]
    light = source[source.index(":root {") :].split("}")[0]
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]


def _contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", _themes(), ids=["light", "dark"])
def test_text_has_contrast_and_marks_are_seen(theme: dict[str, str]) -> None:
    for text in ("ink", "quiet", "accent", "alarm"):
        assert _contrast(theme[text], theme["page"]) >= 4.5
    for text in ("ink", "quiet"):
        assert _contrast(theme[text], theme["raised"]) >= 4.5
    for text in ("ink", "alarm"):
        assert _contrast(theme[text], theme["alarm-page"]) >= 4.5
    for colour in (figures.GREY, figures.BLUE, figures.OCHRE, figures.PINK, figures.GREEN, figures.RED, figures.VIOLET):
        assert _contrast(colour, theme["page"]) >= 3


# --- small and broken runs -------------------------------------------------------------------------------------------


def test_one_seed_and_one_task_are_enough() -> None:
    outline = _Outline(page(make_run(["reviews"], SKILLS, [0])))
    assert not outline.wrong
    assert "over 1 task" in outline.text
    assert "The ranks themselves are not tested" in outline.text
    assert len(outline.data) == 6


def test_a_run_without_a_result_says_so() -> None:
    failures = tuple(Failure("gerund", method, 0, f"{method} broke") for method in SKILLS)
    outline = _Outline(page(make_run(["gerund"], SKILLS, [0], failures)))
    assert not outline.wrong
    assert not outline.data
    text = _words(outline.text)
    assert "No overall result" in text
    assert "9 of 9 cells failed" in text
    assert "No cell has a result." in text
    assert all(f"{method} broke" in text for method in SKILLS)
    assert "no verdict" in text


def test_a_run_that_goes_on_says_how_far_it_is() -> None:
    run = make_run(["gerund"], SKILLS, [0])
    run.config["seeds"] = [0, 1]
    text = _words(_Outline(page(run)).text)
    assert "The run is not finished" in text
    assert "9 of 18 cells have been run." in text


def test_a_run_of_few_shot_alone_has_nothing_to_compare() -> None:
    text = _words(_Outline(page(make_run(["gerund"], {"few-shot": 1.0}, [0]))).text)
    assert "No comparison: only few-shot has results." in text


def test_equal_points_have_no_correlation() -> None:
    run = make_run(["gerund"], {"few-shot": 1.0, "linear": 1.0}, [0])
    drawing = figures.closeness(run)
    assert drawing is not None
    assert "too few, or too much alike" in drawing.says


@pytest.mark.parametrize("name", ["plotly", "jinja2"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=rf'^wanted .*{name}.*; found .*; run: pip install "taskvec\[report\]"$'):
        page(make_run(["gerund"], {"few-shot": 1.0}, [0]))


# --- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")

PROBE = """
document.querySelectorAll("details").forEach((details) => { details.open = true; });
const by = (text) => [...document.querySelectorAll("#accuracy thead button")].find((b) => b.textContent === text);
const column = (i) => [...document.querySelectorAll("#accuracy tbody tr")].map((row) => row.cells[i].innerText.trim());
const order = (i) => column(i).map((text) => text.split("\\n")[0].trim());
const last = document.querySelectorAll("#accuracy thead th").length - 1;
const press = (text) => { by(text).click(); return by(text).closest("th").getAttribute("aria-sort"); };
const out = { width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth };
out.charts = document.querySelectorAll(".chart").length;
out.drawn = document.querySelectorAll(".chart svg.main-svg").length;
out.wide = [...document.querySelectorAll(".chart")].filter((c) => c.getBoundingClientRect().right > innerWidth).length;
out.before = order(0);
out.sorts = [press("mean"), order(last), press("mean"), order(last), press("method"), order(0)];
out.keys = document.querySelectorAll(".key button").length;
const few = document.querySelector('.chart[data-from="data-bars-0"]');
out.bars = few.querySelectorAll(".bars .point").length;
out.named = [...few.querySelectorAll(".ytick text")].map((text) => text.textContent);
const far = document.querySelector('.chart[data-from="data-closeness"]');
Plotly.Fx.hover(far, [{ curveNumber: 0, pointNumber: 0 }]);
out.hover = far.querySelector(".hoverlayer").textContent;
document.querySelectorAll(".key button")[1].click();
out.fewer = [...few._fullData].filter((trace) => trace.visible === false).length;
out.ink = getComputedStyle(document.body).color;
out.tick = getComputedStyle(few.querySelector(".ytick text")).fill;
document.querySelector(".theme").click();
out.dark = [getComputedStyle(document.body).color, getComputedStyle(few.querySelector(".ytick text")).fill];
out.ran = [document.documentElement.dataset.ran || "", document.images.length];
"""


def browse(folder: Path, text: str, *, probe: str = "", width: int = 1280) -> str:
    """The page's DOM after it has run, in a frame of that width. The probe's `out` is in a `data-out` attribute."""
    script = f"addEventListener('load', () => setTimeout(() => {{ {probe}; parent.postMessage(out, '*'); }}, 300))"
    (folder / "page.html").write_text(_with(text, script) if probe else text, "utf-8")
    show = "document.documentElement.dataset.out = JSON.stringify(event.data)"
    frame = f'<iframe src="page.html" style="border: 0; width: {width}px; height: 900px"></iframe>'
    outer = f'<!DOCTYPE html><script>addEventListener("message", (event) => {{ {show}; }});</script>{frame}'
    (folder / "frame.html").write_text(outer, "utf-8")
    place = folder / ("frame.html" if probe else "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--virtual-time-budget=6000", "--window-size=1400,1000"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", place.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _with(text: str, script: str) -> str:
    """The page with one more script, and so without the policy that forbids it: escaping alone must do."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    before, after = text.rsplit("</body>", 1)
    return f"{before}<script>{script}</script></body>{after}"


def _probed(folder: Path, text: str, width: int) -> dict[str, Any]:
    found = re.search(r'data-out="([^"]*)"', browse(folder, text, probe=PROBE, width=width))
    assert found is not None
    out: dict[str, Any] = json.loads(html.unescape(found[1]))
    return out


@browser
def test_in_a_browser_it_draws_under_its_own_policy(rich: str, tmp_path: Path) -> None:
    dom = browse(tmp_path, rich)
    assert dom.count('class="main-svg"') >= 18
    assert 'class="chart js-plotly-plot"' in dom


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_hostile_names_are_text_and_headers_sort(hostile: str, tmp_path: Path, width: int) -> None:
    out, run = _probed(tmp_path, hostile, width), hostile_run()
    assert out["ran"] == ["", 0]
    assert (out["width"], out["scroll"], out["wide"]) == (width, width, 0)
    assert out["drawn"] >= out["charts"] == 12
    assert out["keys"] == len(run.methods)
    assert [name.rstrip("…") for name in out["named"]] == [name[: figures.MANY - 1].strip() for name in run.scored]
    assert f"zero-shot on {run.tasks[0]}, seed 0" in out["hover"]
    assert out["bars"] == len(run.scored)
    assert out["before"] == run.scored
    down, falling, up, rising, by_name, names = out["sorts"]
    assert (down, up, by_name) == ("descending", "ascending", "ascending")
    assert falling == sorted(falling, key=float, reverse=True)
    assert rising == sorted(rising, key=float)
    assert sorted(names) == sorted(run.scored)
    assert names != out["before"]
    assert out["fewer"] == 2
    assert out["dark"][0] != out["ink"]
    assert out["dark"][1] != out["tick"]
