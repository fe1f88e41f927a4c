"""Sets fetched through the package datasets: a stand-in for it, no network."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from taskvec.errors import DataError, MissingPackage
from taskvec.tasks import Task, datasets
from taskvec.tasks.hub import HUB, read_hub

LABELS = HUB["dbpedia"].labels


def stand_in(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[Any]:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((args, options))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_rows_become_examples_once_each_without_code_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"content": f" text   {i} ", "label": i % 14} for i in range(140)]
    rows += [{"content": "text 3", "label": 5}, {"content": "  ", "label": 1}, {"content": "off", "label": 14}]
    asked = stand_in(monkeypatch, rows)
    examples = {example.input: example.output for example in read_hub("dbpedia")}
    assert examples == {f"text {i}": LABELS[i % 14] for i in range(140)}
    ((args, options),) = asked
    assert args == ("fancyzhx/dbpedia_14",)
    assert "trust_remote_code" not in options


def test_the_task_has_the_papers_template_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"content": f"text {i}", "label": i % 14} for i in range(420)])
    task = Task.from_jsonl("dbpedia", shots=28, n_test=50)
    assert task.spec.labels == LABELS
    assert len(LABELS) == 14
    prompt = task.spec.format.prompt("some text").text
    assert prompt == "Input: some text\nLabel:"
    demos = task.train.demonstrations(seed=0)
    assert {label: [d.output for d in demos].count(label) for label in LABELS} == dict.fromkeys(LABELS, 2)


def test_it_is_listed_and_says_that_it_needs_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert datasets()["dbpedia"].category == "Hub"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackage, match="run: pip install datasets"):
        read_hub("dbpedia")


def test_a_failed_fetch_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="no route; connect to a network") as caught:
        read_hub("dbpedia")
    assert "\n" not in str(caught.value)
