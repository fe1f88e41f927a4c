"""The generated parts of README and docs. `make docs` writes them from the files in docs/results, `make check` checks.

`make results` measures those files again (docs/measure.sh).
"""

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Want = dict[str, object]
MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results"
ANALYSES = RESULTS.parent / "analysis"
COLUMNS = {
    "accuracy": "accuracy",
    "label_accuracy": "label accuracy",
    "d_ntp": "d_ntp",
    "d_ntp_full": "d_ntp_full",
    "prompt_tokens": "prompt tokens",
    "computed_tokens": "computed",
    "query_ms": "ms a query",
    "fit_seconds": "fit s",
}


def read(name: str) -> dict[str, Any]:
    """One measured file."""
    loaded: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    return loaded


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A metric with its interval, a number, or a dash."""
    if isinstance(value, dict):
        return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, int | float) else str(value)


def demo() -> str:
    """The demo's table and verdict."""
    result = read("demo")
    rows = result["rows"]
    shown = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    table = markdown(
        ["method", *(COLUMNS[key] for key in shown)],
        [[row["method"], *(cell(row[key]) for key in shown)] for row in rows],
    )
    n = rows[0]["n"]
    return f"\n{table}\n\n(n = {n} test items, seed 0) **{result['verdicts'][0]['sentence']}**\n"


def evaluation() -> str:
    """Several tasks, three seeds: the mean of the seeds, and the lowest and highest seed behind it."""
    names = sorted(path.stem for path in RESULTS.glob("eval_*.json"))
    rows = [row for name in names for row in read(name)["rows"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["method"]), []).append(row)
    keys = ("accuracy", "label_accuracy", "d_ntp", "d_ntp_full", "agreement")
    body = [
        [task, method, str(some[0]["n"]), *(seeds(some, key) for key in keys)]
        for (task, method), some in groups.items()
    ]
    return "\n" + markdown(["task", "method", "n", *keys], body) + "\n"


def seeds(rows: list[dict[str, Any]], key: str) -> str:
    """Mean (lowest to highest) over seeds."""
    values = [row[key]["value"] for row in rows if row[key] is not None]
    if not values:
        return "-"
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def benchmarks() -> str:
    """The ratios."""
    body = []
    for path in sorted(RESULTS.glob("bench_*.json")):
        result, name = read(path.stem), path.stem.removeprefix("bench_")
        parts = (
            [("", result), (" at 400 tokens", result["at_400_tokens"])] if "at_400_tokens" in result else [("", result)]
        )
        for suffix, part in parts:
            numbers = [f"{part['plain_s']:.1f} s", f"{part['packed_s']:.2f} s", f"{part['ratio']:.0f}"]
            difference = f"{part['largest_difference']:.0e}" if "largest_difference" in part else "-"
            body.append([f"`{name}.py`{suffix}", *numbers, difference])
    return "\n" + markdown(["benchmark", "plain", "packed", "ratio", "largest difference"], body) + "\n"


def peers() -> str:
    """Seconds a head patch in other libraries, beside the sweep's."""
    found, sweep = read("peers"), read("bench_function_vector")
    names = {"bare_hook": "a PyTorch hook", "transformer_lens": "transformer-lens 4.3.0", "nnsight": "nnsight 0.8.1"}
    body = [
        [label, f"{1000 * found[key]['s_a_patch']:.0f} ms", f"{found[key]['difference']:.0e}"]
        for key, label in names.items()
    ]
    packed = 1000 * sweep["packed_s"] / sweep["patches"]
    rows = [*body, [f"taskvec, in a sweep of {sweep['patches']:,}", f"{packed:.1f} ms", "reference"]]
    return "\n" + markdown(["", "time a patch", "largest difference of an effect"], rows) + "\n"


def regression() -> str:
    """The tables of docs/regression.sh, and its pictures."""
    path = RESULTS / "regression.md"
    text = path.read_text("utf-8").split("\n", 1)[1].strip() if path.is_file() else "Not measured yet."
    pictures = sorted(file.name for file in (RESULTS.parent / "regression").glob("*.svg"))
    shown = "\n\n".join(f"![{name.removesuffix('.svg')}](regression/{name})" for name in pictures)
    return f"\n{text}\n\n{shown}\n" if shown else f"\n{text}\n"


def method_page(name: str) -> str:
    """A method's page: what its module says, what it is, and its fields."""
    import importlib
    from dataclasses import fields

    from taskvec import methods as registry

    method, facts = registry.get(name), registry.facts(name)
    about = (importlib.import_module(method.__module__).__doc__ or "").strip()
    said = {"papers": facts["paper"], "sites by default": facts["sites"], "ops": facts["ops"]}
    said |= {"needs a task with labels": facts["needs_labels"], "needs gradients": facts["needs_gradients"]}
    rows = [[key, _said(value)] for key, value in said.items()]
    settings = [[f"`{f.name}`", f"`{f.default!r}`"] for f in fields(method)]
    table = markdown(["field", "default"], settings) if settings else "It has no fields."
    doc = inspect.cleandoc(method.__doc__ or "").removeprefix("Fields.").strip()
    parts = [f"# {name}", about, markdown(["", ""], rows), "## Fields", doc, table]
    return "\n" + "\n\n".join(parts) + "\n"


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"`{part}`" for part in value) or "-"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def by_method(rows: list[dict[str, Any]]) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """(rows by method, the metrics that any of them has)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    keys = ("accuracy", "first_token_accuracy", "label_accuracy", "d_ntp", "d_ntp_full")
    return groups, [key for key in keys if any(row[key] is not None for row in rows)]


def method_results() -> str:
    """Every method on every task measured: the mean of the seeds, and the lowest and highest seed."""
    out = []
    for path in sorted(RESULTS.glob("methods_*.json")):
        groups, shown = by_method(rows := read(path.stem)["rows"])
        body = [
            [method, *(seeds(some, key) for key in shown), *(cell(mean_of(some, key)) for key in COSTS)]
            for method, some in groups.items()
        ]
        first = rows[0]
        count = len({row["seed"] for row in rows})
        table = markdown(["method", *shown, *COSTS.values()], body)
        out.append(f"## {first['task']}\n\nn = {first['n']} test items, {count} seeds.\n\n{table}")
    return "\n" + "\n\n".join(out) + "\n"


def transfers() -> str:
    """Both directions of transfer, a table a task."""
    out = []
    for path in sorted(RESULTS.glob("transfer_*.json")):
        groups, shown = by_method(read(path.stem)["rows"])
        body = [[method, *(seeds(some, key) for key in shown)] for method, some in groups.items()]
        _, way, task = path.stem.split("_", 2)
        pair = "Gemma-3-270m into SmolLM2-135M" if way == "down" else "SmolLM2-135M into Gemma-3-270m"
        out.append(f"### {task}: {pair}\n\n{markdown(['method', *shown], body)}")
    return "\n" + "\n\n".join(out) + "\n"


def adaptive_speed() -> str:
    """What training an adaptive vector and asking with it took."""
    found = read("speed_adaptive")
    fit = f"{found['tasks']} tasks, {found['rows']} rows, {found['epochs']} epochs: {found['fit_s']:.0f} s"
    ask = (
        f"a query {found['query_ms']['injected']:.0f} ms beside {found['query_ms']['bare']:.0f} ms for the bare prompt"
    )
    share = f"{found['over_two_passes']:.2f} of two bare passes"
    return f"\n{fit} of training with a frozen generator; {ask} ({share}); {found['peak_gib']:.1f} GiB at most.\n"


def analyses(model: str) -> str:
    """What the published statements come to on a model: each with its null, a column a task; then every analysis'
    sentence and picture."""
    folder, tasks = ANALYSES / model, analysed(model)
    if not tasks:
        return "\nNot measured yet.\n"
    body = [[said, *(_looked(model, task, name, want) for task in tasks)] for said, name, want in STATEMENTS]
    out = [markdown(["", *tasks], body)]
    for task in tasks:
        out.append(f"## {task}")
        for path in sorted(folder.glob(f"{task}-*/says.json")):
            place = f"{model}/{path.parent.name}"
            when = "" if path.parent.name.endswith("early") else " (the late vector)"
            for name, says in json.loads(path.read_text("utf-8")).items():
                out.append(f"**{name}**{when}. {says}\n\n![{name}]({place}/{name}.svg)")
    return "\n" + "\n\n".join(out) + "\n"


STATEMENTS: list[tuple[str, str, Want]] = [
    ("accuracy, zero-shot", "early/ov", {"part": "variants", "way": "zero-shot", "vector": "vector"}),
    ("with the vector", "early/ov", {"part": "variants", "way": "itself", "vector": "vector"}),
    ("OV path instead of it", "early/ov", {"part": "variants", "way": "ov", "vector": "vector"}),
    ("null: of random vectors", "early/ov", {"part": "variants", "way": "ov", "vector": "random vector"}),
    ("MLPs' path instead", "early/ov", {"part": "variants", "way": "mlp", "vector": "vector"}),
    ("the vector without its OV path", "early/ov", {"part": "variants", "way": "without ov", "vector": "vector"}),
    ("null: without random vectors'", "early/ov", {"part": "variants", "way": "without ov", "vector": "random vector"}),
    ("accuracy on the other half of the items", "early/heads", {"way": "vector", "heads": "key heads", "percent": 0}),
    ("without a tenth of the heads", "early/heads", {"way": "vector", "heads": "key heads", "percent": 10}),
    (
        "null: heads of the same layers",
        "early/heads",
        {"way": "vector", "heads": "random heads of the same layers", "percent": 10},
    ),
    ("R² of the mean Jacobian, the vector", "early/propagation", {"measure": "R2", "by": "J, the vector", "own": True}),
    ("random vectors", "early/propagation", {"measure": "R2", "by": "J, random vectors", "own": True}),
    ("their sums", "early/propagation", {"measure": "R2", "by": "J, sums", "own": True}),
    (
        "to beat there: the constant shift",
        "early/propagation",
        {"measure": "R2", "by": "constant shift, of sums", "own": True},
    ),
    ("early vector: cos(v, Qv)", "early/rotation", {"measure": "cos(v, Qv)", "of": "the vector", "own": True}),
    ("null: random vectors", "early/rotation", {"measure": "cos(v, Qv)", "of": "random vectors", "own": True}),
    ("its alignment", "early/rotation", {"measure": "alignment of v", "of": "the vector", "own": True}),
    ("rotated", "early/rotation", {"measure": "alignment of Qv", "of": "the vector", "own": True}),
    (
        "null: random vectors, rotated",
        "early/rotation",
        {"measure": "alignment of Qv", "of": "random vectors", "own": True},
    ),
    ("late vector: cos(v, Qv)", "late/rotation", {"measure": "cos(v, Qv)", "of": "the vector", "own": True}),
    ("null: random vectors", "late/rotation", {"measure": "cos(v, Qv)", "of": "random vectors", "own": True}),
    ("late vector: |Sv| / |v|", "late/rotation", {"measure": "|Sv| / |v|", "of": "the vector", "own": True}),
    ("null: random vectors", "late/rotation", {"measure": "|Sv| / |v|", "of": "random vectors", "own": True}),
]
"""What is said, the vector and analysis it is read from, and the row (`own`: at the vector's own layer)."""


def analysed(model: str) -> list[str]:
    """The tasks of docs/analysis."""
    return sorted(path.name.removesuffix("-early") for path in (ANALYSES / model).glob("*-early"))


def row_of(model: str, task: str, name: str, want: Want) -> tuple[float, float, float]:
    """(value, low, high) of one row of an analysis."""
    import polars as pl

    when, analysis = name.split("/")
    path = ANALYSES / model / f"{task}-{when}"
    rows = pl.read_csv(path / f"{analysis}.csv", infer_schema_length=None)
    asked = dict(want)
    if asked.pop("own", False):
        at = re.search(r"resid\[(\d+)\]", json.loads((path / "says.json").read_text("utf-8"))["rotation"])
        assert at is not None
        asked["layer"] = int(at[1])
    found = rows.filter(*(pl.col(key) == value for key, value in asked.items()))
    assert len(found) == 1, f"{len(found)} rows of {path}/{analysis}.csv are {asked}"
    value, low, high = (float(found[key][0]) for key in ("value", "low", "high"))
    return value, low, high


def _looked(model: str, task: str, name: str, want: Want) -> str:
    value, low, high = row_of(model, task, name, want)
    return f"{value:.2f}" if low == high else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def adaptive_run() -> str:
    """Seen and unseen tasks, by category and each by itself: the run's own tables."""
    path = RESULTS / "adaptive.md"
    if not path.is_file():
        return "\nNot measured yet.\n"
    parts = path.read_text("utf-8").split("\n\n")
    wanted = ("Mean accuracy over the tasks", "Accuracy on test items")
    kept = [f"{part}\n\n{parts[i + 1]}" for want in wanted for i, part in enumerate(parts) if part.startswith(want)]
    return "\n" + "\n\n".join(kept).strip() + "\n"


def run_tables() -> str:
    """The benchmark run's own tables, without its title."""
    text = (RESULTS.parent / "benchmark" / "tables.md").read_text("utf-8")
    return "\n" + text.partition("\n")[2].strip() + "\n"


COSTS = {"fit_tokens": "fit tokens", "fit_seconds": "fit s"}


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    """The mean of a plain number over rows."""
    return float(sum(row[key] for row in rows) / len(rows))


def methods() -> str:
    """The methods with the first paragraph of their pages."""
    import importlib

    from taskvec import methods as registry

    body = []
    for name in registry.names():
        module = importlib.import_module(registry.get(name).__module__)
        body.append([f"`{name}`", (module.__doc__ or "").split("\n\n")[0].replace("\n", " ")])
    return "\n" + markdown(["method", "what it is"], body) + "\n"


def commands() -> str:
    """The commands with their first lines."""
    from taskvec.cli.app import app

    body = [
        [f"`taskvec {c.callback.__name__}`", (c.callback.__doc__ or "").splitlines()[0]]
        for c in app.registered_commands
        if c.callback is not None
    ]
    return "\n" + markdown(["command", "what it does"], body) + "\n"
