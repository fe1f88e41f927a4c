"""Sets fetched through the package datasets: a stand-in for it, no network."""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from taskvec.errors import DataError, MissingPackage
from taskvec.tasks import Task, datasets
from taskvec.tasks.hub import read_hub
from taskvec.tasks.hub_sets import HUB
from taskvec.tasks.suite import load_suite

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
    assert args == ("fancyzhx/dbpedia_14", None)
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


# --- the adaptive paper's sets: a row as its page shows it, and what is made of it ------------------------------------

_ANSWERS = {"label": ["A", "B", "C", "D"], "text": ["a bank", "a tree", "the sea", "Mars"]}
_OPTIONS = "(A) a bank (B) a tree (C) the sea (D) Mars"
_BBQ = {"context": "Two people met.", "question": "Who was late?", "ans0": "Ann", "ans1": "Bob", "ans2": "Unknown"}
_SUM = {"question": "1 + 1?"}
_WORD = {"word": "bank", "sentence1": "a", "sentence2": "b"}
_PAIR = {"premise": "It rains.", "hypothesis": "It is wet."}
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "commonsense_qa": ({"question": "Where?", "choices": _ANSWERS, "answerKey": "C"}, f"Where? {_OPTIONS}", "C"),
    "openbookqa": ({"question_stem": "Where?", "choices": _ANSWERS, "answerKey": "A"}, f"Where? {_OPTIONS}", "A"),
    "arc_challenge": (
        {"question": "Where?", "choices": _ANSWERS | {"label": ["1", "2", "3", "4"]}, "answerKey": "4"},
        f"Where? {_OPTIONS}",
        "D",
    ),
    "hellaswag": ({"ctx": "A man", "endings": _ANSWERS["text"], "label": "1"}, f"A man {_OPTIONS}", "B"),
    "boolq": ({"passage": "Salt.", "question": "is it salt", "answer": True}, "Salt. is it salt?", "True"),
    "bbh_boolean_expressions": ({"input": "not ( True ) is", "target": "False"}, "not ( True ) is", "False"),
    "bbh_date_understanding": ({"input": "Which date?\n(A) 1 May", "target": "(A)"}, "Which date? (A) 1 May", "A"),
    "bbh_reasoning_about_colored_objects": ({"input": "Which colour?", "target": "(R)"}, "Which colour?", "R"),
    "bbh_temporal_sequences": ({"input": "When?", "target": "(D)"}, "When?", "D"),
    "bbh_logical_deduction_five_objects": ({"input": "Which?", "target": "(E)"}, "Which?", "E"),
    "math_qa": ({"Problem": "1 + 1 ?", "options": "a ) 1 , b ) 2", "correct": "b"}, "1 + 1 ? a ) 1 , b ) 2", "B"),
    "mmlu_pro_math": (_SUM | {"category": "math", "options": ["1", "2"], "answer": "B"}, "1 + 1? (A) 1 (B) 2", "B"),
    "bbq_age": (_BBQ | {"label": 2}, "Two people met. Who was late? (A) Ann (B) Bob (C) Unknown", "C"),
    "bbq_religion": (_BBQ | {"label": 0}, "Two people met. Who was late? (A) Ann (B) Bob (C) Unknown", "A"),
    "ethics_justice": ({"scenario": "I am owed.", "label": 1}, "I am owed.", "reasonable"),
    "ethics_commonsense": ({"input": "I lied.", "label": 1}, "I lied.", "wrong"),
    "superglue_rte": (_PAIR | {"label": 0}, "premise: It rains. hypothesis: It is wet.", "True"),
    "superglue_wic": (_WORD | {"label": 1}, "word: bank sentence1: a sentence2: b", "True"),
    "glue_qnli": ({"question": "Who?", "sentence": "Ann.", "label": 1}, "question: Who? sentence: Ann.", "False"),
    "glue_sst2": ({"sentence": "a fine film ", "label": 1}, "a fine film", "positive"),
    "glue_mnli": (_PAIR | {"label": 1}, "premise: It rains. hypothesis: It is wet.", "Neither"),
    "glue_cola": ({"sentence": "He go.", "label": 0}, "He go.", "unacceptable"),
    "aqua_rat": (_SUM | {"options": ["A)1", "B)2"], "correct": "B"}, "1 + 1? (A) 1 (B) 2", "B"),
    "mmlu_high_school_psychology": (_SUM | {"choices": ["1", "2"], "answer": 1}, "1 + 1? (A) 1 (B) 2", "B"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_adaptive_papers_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, words, label = ROWS[name]
    asked = stand_in(monkeypatch, [row])
    assert [(example.input, example.output) for example in read_hub(name)] == [(words, label)]
    assert label in HUB[name].labels
    ((args, options),) = asked
    assert args == (HUB[name].id, HUB[name].config)
    assert options == {"split": HUB[name].split, "revision": HUB[name].revision}


def test_the_suite_has_the_papers_twenty_and_five_in_its_categories() -> None:
    suite = load_suite("adaptive-hub")
    assert (len(suite.tasks), len(suite.unseen)) == (20, 5)
    assert {*suite.tasks, *suite.unseen} == {*ROWS, "crows_pairs"}
    by_category = Counter(HUB[name].category for name in suite.tasks)
    assert by_category == {"Knowledge": 4, "Reasoning": 5, "Math": 2, "Safety": 4, "NLU": 5}


def test_a_stereotype_is_as_often_the_first_sentence_as_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"sent_more": f"more {i}", "sent_less": f"less {i}"} for i in range(200)])
    examples = read_hub("crows_pairs")
    for example in examples:
        number = example.input.split()[-1]
        first, second = (f"more {number}", f"less {number}")[:: 1 if example.output == "A" else -1]
        assert example.input == f"Which sentence is a stereotype? (A) {first} (B) {second}"
    assert 70 < sum(example.output == "A" for example in examples) < 130


def test_other_subjects_and_hidden_labels_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"category": "law", "question": "?", "options": ["x"], "answer": "A"}])
    assert read_hub("mmlu_pro_math") == []
    stand_in(monkeypatch, [{"sentence": "hidden", "label": -1}])
    assert read_hub("glue_cola") == []


def test_columns_of_another_name_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match="as glue_cola reads them; found row 0: KeyError 'sentence'"):
        read_hub("glue_cola")
