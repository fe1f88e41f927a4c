"""inspect, methods, models, tasks, doctor: what there is, and whether it is in order."""

import importlib.util
import json
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from taskvec import methods as registry
from taskvec.cli import show
from taskvec.progress import shown
from taskvec.tasks import builtin_tasks, datasets, load_task
from taskvec.tasks.read import read_examples
from taskvec.tasks.suite import builtin_suites

TINY_ABOUT = "0.2 M weights, trained on the synthetic tasks tiny_*; for tests and first steps"
PACKAGES = ("taskvec", "torch", "transformers", "safetensors", "tokenizers", "gguf", "peft")


def show_vector(folder: Path, *, as_json: bool) -> None:
    """A vector folder: loading it checks every byte."""
    from taskvec.vector import TaskVector
    from taskvec.vector.store import CARD, CONFIG

    if not (folder / CONFIG).is_file() and not isinstance(source := registry.load(folder), TaskVector):
        show_source(source, folder, as_json=as_json)
        return
    vector = TaskVector.from_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    norms = {name: float(t.norm()) for name, t in vector.tensors().items()}
    if as_json:
        show.emit({**config, "norms": norms, "vector": str(folder)})
        return
    show.table([["edit", "site", "op", "where", "strength", "tensors (norm)"], *_edit_rows(vector, config, norms)])
    if vector.origin is not None:
        show.say("")
        plain = vector.origin.model_dump(mode="json")
        plain["demos"] = f"{len(vector.origin.demos)} demonstrations"
        show.table([["origin", ""]] + [[name, str(value)] for name, value in plain.items()])
    card = (folder / CARD).read_text("utf-8")
    if "## Scores" in card:
        show.say("\n" + card.split("```text\n", 1)[1].split("```", 1)[0])


def show_source(source: Any, folder: Path, *, as_json: bool) -> None:
    """A saved vector source: its origin, and the sites it may edit."""
    rows = {"sites": [str(site) for site in source.sites], "origin": source.origin.model_dump(mode="json")}
    if as_json:
        show.emit({**rows, "vector": str(folder)})
        return
    plain = {**rows["origin"], "demos": f"{len(source.origin.demos)} demonstrations", "sites": ", ".join(rows["sites"])}
    show.table([["source", ""]] + [[name, str(value)] for name, value in plain.items()])


def show_methods(*, as_json: bool) -> None:
    """All methods' names."""
    rows = [registry.facts(name) for name in [*registry.names(), "random"]]
    cells = [["method", "paper", "sites", "ops", "labels", "gradients"]]
    cells += [[_fact(value) for value in row.values()] for row in rows]
    show.emit({"methods": rows}) if as_json else show.table(cells)


def show_method(name: str, *, as_json: bool) -> None:
    """One method's page."""
    method: Any = registry.get(name)
    values = {f.name: repr(f.default) for f in fields(method)} if is_dataclass(method) else {}
    about = importlib.import_module(method.__module__).__doc__ or ""
    if as_json:
        show.emit({"method": name, "about": about, "doc": method.__doc__, "fields": values})
        return
    show.say(f"{about.strip()}\n\n{(method.__doc__ or '').strip()}\n")
    show.table([["field", "default"], *([key, value] for key, value in values.items())])


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else _yes(value)


def show_models(*, as_json: bool) -> None:
    """The aliases, and whether their packages are installed."""
    from taskvec.lm.load import ALIASES

    rows = [
        {"model": name, "installed": bool(alias.parts()), "about": alias.about, "install": alias.pip}
        for name, alias in ALIASES.items()
    ]
    rows.append({"model": "tiny", "installed": True, "about": TINY_ABOUT, "install": ""})
    if as_json:
        show.emit({"models": rows})
        return
    show.table([["model", "installed", "about", "install"]] + [[_yes(v) for v in row.values()] for row in rows])
    show.say("\nAny folder or Hub id of a causal language model works too.")


def show_task(name: str, *, as_json: bool) -> None:
    """One task's first examples."""
    task = load_task(name)
    examples = [{"input": e.input, "output": e.output} for e in task.train.examples[:10]]
    if as_json:
        show.emit({"task": task.name, "n": len(task.examples), "labels": task.spec.labels, "examples": examples})
        return
    show.say(f"{task.name}: {len(task.examples)} examples\n")
    show.table([["input", "output"], *([e["input"], e["output"]] for e in examples)])


def show_tasks(*, as_json: bool) -> None:
    """The built-in tasks and suites."""
    import taskvec.tasks.read as read

    counts = {task: len(read_examples(read._DATA / f"{task}.jsonl")) for task in builtin_tasks()}
    rows = [
        {"task": task, "n": counts.get(task), "category": s.category, "about": s.description}
        for task, s in (builtin_tasks() | datasets()).items()
    ]
    suites = [suite.model_dump(mode="json") for suite in builtin_suites().values()]
    if as_json:
        show.emit({"tasks": rows, "suites": suites})
        return
    cells = [["-" if value is None else str(value) for value in row.values()] for row in rows]
    show.table([["task", "n", "category", "about"], *cells])
    show.say("")
    show.table([["suite", "tasks", "about"], *([s["name"], str(len(s["tasks"])), s["description"]] for s in suites)])


def show_health(model: str, device: str | None, dtype: str | None, *, as_json: bool) -> None:
    """Versions, and the proofs of one model."""
    from taskvec.hooks import prove
    from taskvec.lm import LM
    from taskvec.replay import packs

    versions = {name: _version(name) for name in PACKAGES}
    with shown():
        lm = LM.load(model, device=device, dtype=dtype)
        prove(lm)
        reason = packs(lm)
    refused = {str(site): why for site, why in lm.proofs["sites"].items()}
    health = {
        "versions": versions,
        "model": lm.id,
        "fingerprint": lm.fingerprint,
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "layers": lm.n_layers,
        "heads": lm.n_heads,
        "sites_proved": len(lm.sites()) - len(refused),
        "sites_refused": refused,
        "packed": reason is None,
        "plain_because": reason,
    }
    if as_json:
        show.emit(health)
    else:
        show.table([["check", "found"], *([key, _yes(value)] for key, value in health.items())])


def _edit_rows(vector: Any, config: dict[str, Any], norms: dict[str, float]) -> list[list[str]]:
    rows = []
    for i, (edit, record) in enumerate(zip(vector.edits, config["edits"], strict=True)):
        tensors = [f"{n} {tuple(t.shape)} ({norms[f'{i}.{n}']:.3g})" for n, t in edit.op.tensors().items()]
        where = [str(edit.site), record["op"], str(edit.where), f"{edit.strength:g}"]
        rows.append([str(i), *where, ", ".join(tensors)])
    return rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _yes(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
