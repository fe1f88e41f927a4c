"""Task files, splits, demonstrations, and the built-in tasks."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskvec.errors import DataError, InputError, TaskvecError, UnknownName
from taskvec.prompts import Example, PromptFormat
from taskvec.tasks import (
    Dev,
    Split,
    Task,
    TaskSpec,
    Test,
    Train,
    answer_nll,
    builtin_tasks,
    load_task,
    read_examples,
)

BUILTIN = sorted(builtin_tasks())
fixture_is_fine = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _examples(n: int, outputs: Sequence[str] = ()) -> list[Example]:
    return [Example(f"in {i}", outputs[i % len(outputs)] if outputs else f"out {i}") for i in range(n)]


def _task(n: int = 60, *, shots: int = 10, n_test: int = 100, labels: tuple[str, ...] | None = None) -> Task:
    spec = TaskSpec("made", shots=shots, labels=labels)
    return Task.from_examples(spec, _examples(n, labels or ()), n_test=n_test)


def _write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def _file(folder: Path, content: str | bytes) -> Path:
    path = folder / "task.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def test_lines_become_examples_in_order(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"input": "b", "output": "B"}\n{"output": "A", "input": "a", "note": [1]}\n')
    assert read_examples(path) == [Example("b", "B"), Example("a", "A")]


def test_numbers_become_text(tmp_path: Path) -> None:
    rows = [
        *('{"input": 7, "output": -8}', '{"input": 1.5, "output": 1e3}', '{"input": 0, "output": 2.0}'),
        f'{{"input": {10**400}, "output": 1}}',
    ]
    assert read_examples(_file(tmp_path, "\n".join(rows))) == [
        Example("7", "-8"),
        Example("1.5", "1000.0"),
        Example("0", "2.0"),
        Example("1" + "0" * 400, "1"),
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n\n", "\n \t\n", "\r\n\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n", "\r\n  \r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_blank_lines_a_byte_order_mark_and_any_line_ends_are_passed_over(
    tmp_path: Path, start: str, newline: str, end: str
) -> None:
    text = start + newline.join(['{"input": "a", "output": "A"}', '{"input": "b", "output": "B"}']) + end
    assert read_examples(_file(tmp_path, text)) == [Example("a", "A"), Example("b", "B")]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\u00a0", "\\n", "\\u2028", "\\r\\n", "\x7f"])
def test_only_newlines_separate_lines(tmp_path: Path, mark: str) -> None:
    path = _file(tmp_path, f'{{"input": "a{mark}b", "output": "c{mark}d"}}\n')
    value = json.loads(f'"{mark}"')
    assert read_examples(path) == [Example(f"a{value}b", f"c{value}d")]


def test_text_loses_only_the_white_space_around_it(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.jsonl", [{"input": "  a \t b\n", "output": "\u00e9\U0001f600 "}])
    assert read_examples(path) == [Example("a \t b", "\u00e9\U0001f600")]


GOOD = '{"input": "a", "output": "A"}'
BAD_LINES = {
    "not json": "input: a",
    "half a line": '{"input": "b", "output"',
    "two values": '{"input": "b", "output": "c"} {}',
    "no object": '["b", "B"]',
    "a string": '"b"',
    "null": "null",
    "no output": '{"input": "b"}',
    "no input": '{"output": "b"}',
    "other case": '{"Input": "b", "Output": "B"}',
    "bool": '{"input": "b", "output": true}',
    "none": '{"input": null, "output": "B"}',
    "list": '{"input": "b", "output": ["B"]}',
    "object": '{"input": {"b": 1}, "output": "B"}',
    "nan": '{"input": "b", "output": NaN}',
    "infinity": '{"input": -Infinity, "output": "B"}',
    "overflow": '{"input": 1e999, "output": "B"}',
    "too many digits": '{"input": ' + "1" * 5000 + ', "output": "B"}',
    "empty input": '{"input": "", "output": "B"}',
    "blank output": '{"input": "b", "output": " \\n\\t"}',
    "nul": '{"input": "b\\u0000", "output": "B"}',
    "half a pair": '{"input": "b", "output": "\\ud800"}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_by_its_number_and_nothing_is_half_read(tmp_path: Path, line: str) -> None:
    path = _file(tmp_path, "\n".join([GOOD, "", GOOD.replace("a", "b"), line, GOOD.replace("a", "c"), line]))
    with pytest.raises(DataError, match=r"task\.jsonl, line 4\b") as caught:
        read_examples(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input": "b"}', r'"output".*keys \[\'input\'\]'),
        ("[1]", "found list"),
        ('{"input": "b", "output": true}', '"output" at .*found True'),
        ('{"input": "", "output": "B"}', "\"input\" at .*found ''"),
        ('{"input": NaN, "output": "B"}', "a finite number as .*found nan"),
    ],
)
def test_a_bad_line_is_described(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_examples(_file(tmp_path, line))


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", " \n\t\r\n", "\u2028\n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match="empty file"):
        read_examples(_file(tmp_path, content))


@pytest.mark.parametrize("content", [b"\xff\xfe", GOOD.encode("utf-16"), b'{"input": "\xe9", "output": "x"}', b"\x80"])
def test_another_encoding_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="UTF-8"):
        read_examples(_file(tmp_path, content))


def _examples_or_data_error(path: Path) -> None:
    try:
        examples = read_examples(path)
    except DataError:
        return
    assert examples
    for example in examples:
        for side in (example.input, example.output):
            assert side.strip() == side != ""
            side.encode()


@given(st.binary(max_size=120))
@fixture_is_fine
def test_arbitrary_bytes_are_examples_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    _examples_or_data_error(_file(tmp_path, content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["input", "output", ""]), inner),
    max_leaves=4,
)
json_rows = st.fixed_dictionaries({"input": json_values, "output": json_values}) | json_values


@given(st.lists(json_rows, max_size=3), st.booleans(), st.sampled_from(["\n", "\r\n", "\r", "\n\n"]))
@fixture_is_fine
def test_arbitrary_json_lines_are_examples_or_a_data_error(
    tmp_path: Path, rows: list[Any], ascii_only: bool, newline: str
) -> None:
    lines = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    _examples_or_data_error(_file(tmp_path, lines.encode("utf-8", "surrogatepass")))


@given(st.lists(st.tuples(*[st.text(min_size=1, max_size=6)] * 2), min_size=1, max_size=4), st.booleans())
@fixture_is_fine
def test_any_texts_with_something_in_them_are_read_back(
    tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool
) -> None:
    rows = [(a.replace("\x00", "0") + "x", "y" + b.replace("\x00", "0")) for a, b in rows]
    lines = [json.dumps({"input": a, "output": b}, ensure_ascii=ascii_only) for a, b in rows]
    assert read_examples(_file(tmp_path, "\n".join(lines))) == [Example(a.strip(), b.strip()) for a, b in rows]


# --- sidecars and names ----------------------------------------------------------------------------------------------


def _rows(n: int = 60, outputs: Sequence[str] = ()) -> list[dict[str, str]]:
    return [{"input": e.input, "output": e.output} for e in _examples(n, outputs)]


def test_a_file_without_a_sidecar_is_an_open_task_in_qa(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path / "mine.jsonl", _rows()))
    assert (task.name, task.spec.labels, task.spec.shots) == ("mine", None, 10)
    assert task.spec.format == PromptFormat.named("qa")
    assert sorted(e.input for e in task.examples) == sorted(row["input"] for row in _rows())


def test_a_sidecar_gives_labels_format_and_instruction(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows(outputs=("no", "yes")))
    (tmp_path / "mine.yaml").write_text(
        'description: d\ncategory: c\nlabels: ["yes", "no"]\nformat: "{input} => {output}\\n"\ninstruction: Judge.\n'
    )
    task = load_task(str(path), shots=4, n_test=7)
    assert (task.spec.labels, task.spec.outputs, task.spec.shots, len(task.test)) == (
        ("yes", "no"),
        ("yes", "no"),
        4,
        7,
    )
    assert task.train.spec.format.prompt("x").text == "Judge.\n\nx =>"
    own = PromptFormat.named("arrow")
    assert load_task(path, format=own).spec.format is own


def test_a_task_can_be_made_from_a_file_by_its_class(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows())
    assert Task.from_jsonl(path, shots=3) == load_task(path, shots=3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("labels: [yes, no]", "labels"),
        ("labels: 3", "labels"),
        ("lables: [a]", "lables"),
        ("- a", "Sidecar"),
        ("just words", "Sidecar"),
        ("description: [", "line 1"),
        ("a: b: c", "line 1"),
        ("\tdescription: x", "line 1"),
        ("description: 2024-13-45", "month"),
        ("description: !!bool perhaps", "perhaps"),
        ("description: !!python/object:os.system x", "python"),
        ("description: {}", "description"),
        ("[" * 5000, "recursion"),
    ],
)
def test_a_bad_sidecar_is_refused_and_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows())
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"sidecar mine\.yaml.*found .*{said}"):
        load_task(path)


def test_a_sidecar_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows())
    (tmp_path / "mine.yaml").write_bytes(b"description: \xff")
    with pytest.raises(DataError, match=r"mine\.yaml"):
        load_task(path)


def test_a_sidecars_bad_template_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows())
    (tmp_path / "mine.yaml").write_text("format: '{input} only'")
    with pytest.raises(InputError, match="template"):
        load_task(path)


@given(st.binary(max_size=60) | st.text("labes:[]{}-&*!|>'\"#,\n ?0x", max_size=30).map(str.encode))
@fixture_is_fine
def test_arbitrary_sidecars_make_a_task_or_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    path = _write(tmp_path / "mine.jsonl", _rows(30))
    (tmp_path / "mine.yaml").write_bytes(content)
    with suppress(TaskvecError):
        assert len(load_task(path).examples) == 30


@pytest.mark.parametrize("name", ["past-tense", "past_tense", "Past-Tense"])
def test_hyphen_and_underscore_name_the_same_task(name: str) -> None:
    assert load_task(name).name == "past_tense"


@pytest.mark.parametrize(
    "name", ["no-such-task", "", ".", "./past_tense", "data/past_tense", "x" * 5000, "a\x00b", "*"]
)
def test_an_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(UnknownName, match="antonym") as caught:
        load_task(name)
    assert all(task in str(caught.value) for task in BUILTIN)


# --- splits ----------------------------------------------------------------------------------------------------------


@given(st.integers(26, 700), st.integers(1, 400))
@settings(deadline=None, max_examples=60)
def test_splits_are_disjoint_cover_everything_and_have_the_documented_sizes(n: int, n_test: int) -> None:
    task = _task(n, n_test=n_test)
    splits = [task.train, task.dev, task.test]
    assert [len(task.test), len(task.dev)] == [min(n_test, n * 2 // 5), min(100, n // 5)]
    assert [type(split) for split in splits] == [Train, Dev, Test]
    assert sorted(task.examples, key=lambda e: int(e.input[3:])) == _examples(n)
    assert task.examples == task.train.examples + task.dev.examples + task.test.examples
    assert all(split.spec == task.spec for split in splits)


def test_the_split_types_are_siblings() -> None:
    """A type checker refuses a test split where a train split is wanted only if neither is the other."""
    kinds = [Train, Dev, Test]
    assert [[issubclass(a, b) for b in kinds] for a in kinds] == np.eye(3, dtype=bool).tolist()
    assert all(issubclass(kind, Split) for kind in kinds)


def test_the_cut_depends_on_the_data_alone() -> None:
    first = _task()
    random.seed(5)
    other_format = Task.from_examples(
        TaskSpec("other name", PromptFormat.named("arrow", "x"), shots=3, loss=lambda logits, target: 0.0),
        _examples(60),
    )
    assert [e.input for e in other_format.examples] == [e.input for e in first.examples]
    assert other_format.spec.data_hash == first.spec.data_hash


def test_other_data_is_cut_otherwise_and_has_another_hash() -> None:
    first, changed = _task(), [*_examples(59), Example("in 59", "changed")]
    other = Task.from_examples(TaskSpec("made"), changed)
    assert other.spec.data_hash != first.spec.data_hash
    assert {e.input for e in other.test.examples} != {e.input for e in first.test.examples}


def test_the_data_hash_knows_labels_and_where_texts_begin() -> None:
    hashes = {
        Task.from_examples(TaskSpec("t", shots=1, labels=labels), rows).spec.data_hash
        for labels in (None, ("a", "ab"), ("ab", "a"))
        for rows in ([Example("xa" + str(i), "ab") for i in range(9)], [Example("x" + str(i), "a") for i in range(9)])
    }
    assert len(hashes) == 6


def test_the_cut_is_shuffled() -> None:
    numbers = [int(e.input[3:]) for e in _task(200).test.examples]
    assert min(numbers) < 60
    assert max(numbers) > 140
    assert numbers != sorted(numbers)


def test_the_cut_of_a_given_file_never_changes() -> None:
    """Published scores name a task by its data hash: the cut behind it is part of the format."""
    task = _task(30, shots=3)
    assert task.spec.data_hash == "b1e1c2476371a80f729045faa1ba86402002e387b7c2a4e6628e8764ea243f47"
    assert [e.input for e in task.test.examples[:4]] == ["in 8", "in 4", "in 9", "in 13"]
    assert [e.input for e in task.train.demonstrations(seed=0)] == ["in 7", "in 6", "in 17"]


def test_outputs_are_the_labels_or_the_distinct_outputs() -> None:
    assert _task(60, labels=("b", "a", "c")).spec.outputs == ("b", "a", "c")
    rows = _examples(60, ("b", "a", "b"))
    assert Task.from_examples(TaskSpec("t"), rows).spec.outputs == ("a", "b")


def test_the_defaults_work_from_forty_examples_up() -> None:
    task = _task(40)
    assert (len(task.train), len(task.dev), len(task.test)) == (16, 8, 16)


@pytest.mark.parametrize(
    ("n", "shots", "n_test"), [(25, 10, 100), (0, 10, 100), (4, 1, 100), (2, 1, 1), (60, 24, 100), (60, 10**6, 1)]
)
def test_too_few_examples_are_refused_with_what_there_is(n: int, shots: int, n_test: int) -> None:
    with pytest.raises(DataError, match=rf"{shots} shots.*found {n} examples in made"):
        _task(n, shots=shots, n_test=n_test)


def test_the_smallest_tasks_that_work() -> None:
    assert [len(s) for s in (_task(26).train, _task(26).dev, _task(26).test)] == [11, 5, 10]
    assert [len(s) for s in (_task(5, shots=1).train, _task(5, shots=1).dev, _task(5, shots=1).test)] == [2, 1, 2]
    assert len(_task(60, shots=23).train) == 24


@pytest.mark.parametrize(("shots", "n_test"), [(0, 100), (-1, 100), (10, 0), (10, -5)])
def test_no_shots_and_no_test_items_are_refused(shots: int, n_test: int) -> None:
    with pytest.raises(InputError, match=f"found (shots = {shots}|n_test = {n_test});"):
        _task(shots=shots, n_test=n_test)


def test_an_input_that_comes_twice_is_refused() -> None:
    with pytest.raises(DataError, match="'in 3' twice"):
        Task.from_examples(TaskSpec("made"), [*_examples(60), Example("in 3", "something else")])


def test_an_output_that_is_no_label_is_refused() -> None:
    with pytest.raises(DataError, match=r"among its labels a, b; found 'c'"):
        Task.from_examples(TaskSpec("made", labels=("a", "b")), _examples(60, ("a", "b", "c")))


def test_another_format_leaves_the_splits_as_they_are() -> None:
    task, arrow = _task(), PromptFormat.named("arrow")
    other = task.with_format(arrow)
    assert other.examples == task.examples
    assert {split.spec.format for split in (other, other.train, other.dev, other.test)} == {arrow}
    assert [type(s) for s in (other.train, other.dev, other.test)] == [Train, Dev, Test]
    assert task.spec.format == PromptFormat.named("qa")


# --- demonstrations and queries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, ("a", "b", "c")])
@pytest.mark.parametrize("shots", [1, 2, 10, 23])
def test_demonstrations_are_as_many_distinct_train_examples_as_shots(
    labels: tuple[str, ...] | None, shots: int
) -> None:
    task = _task(60, shots=shots, labels=labels)
    demos = task.train.demonstrations(seed=0)
    assert len(demos) == len(set(demos)) == shots
    assert set(demos) <= set(task.train.examples)


@pytest.mark.parametrize("labels", [None, ("a", "b", "c")])
def test_a_seed_gives_one_set_of_demonstrations_and_another_seed_another(labels: tuple[str, ...] | None) -> None:
    train = _task(200, labels=labels).train
    drawn = [train.demonstrations(seed=seed) for seed in range(5)]
    assert drawn == [_task(200, labels=labels).train.demonstrations(seed=seed) for seed in range(5)]
    assert len({frozenset(demos) for demos in drawn}) == 5
    assert drawn[0] != tuple(sorted(drawn[0], key=lambda e: e.input))


@given(st.lists(st.integers(12, 30), min_size=2, max_size=5), st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_demonstrations_are_balanced_over_labels(sizes: list[int], shots: int, seed: int) -> None:
    labels = tuple(f"label {i}" for i in range(len(sizes)))
    outputs = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
    examples = tuple(Example(str(i), output) for i, output in enumerate(outputs))
    demos = Train(TaskSpec("t", shots=shots, labels=labels), examples).demonstrations(seed=seed)
    counts = Counter(demo.output for demo in demos)
    assert sum(counts.values()) == shots
    assert max(counts.values()) - min(counts[label] for label in labels) <= 1


def test_labels_that_are_rare_are_all_shown_before_others_fill_up() -> None:
    examples = tuple(Example(str(i), "rare" if i < 2 else "often") for i in range(40))
    train = Train(TaskSpec("t", shots=10, labels=("rare", "often")), examples)
    for seed in range(5):
        assert Counter(demo.output for demo in train.demonstrations(seed=seed)) == {"rare": 2, "often": 8}


def test_balanced_demonstrations_stand_in_no_fixed_order_of_labels() -> None:
    train = _task(200, labels=("a", "b")).train
    orders = {tuple(demo.output for demo in train.demonstrations(seed=seed)) for seed in range(8)}
    assert len(orders) > 4
    assert any(a == b for order in orders for a, b in zip(order[::2], order[1::2], strict=True))  # not label by label


@pytest.mark.parametrize("limit", [None, 0, 1, 5, 10**6])
def test_queries_are_the_other_train_examples_in_random_order(limit: int | None) -> None:
    train = _task(100).train
    demos = train.demonstrations(seed=1)
    queries = train.queries(demos, limit, seed=1)
    rest = [example for example in train.examples if example not in demos]
    assert not set(queries) & set(demos)
    assert len(queries) == len(set(queries)) == min(len(rest), len(rest) if limit is None else limit)
    assert set(queries) <= set(rest)
    assert train.queries(demos, limit, seed=1) == queries
    if limit is None:
        assert list(queries) != rest
        assert train.queries(demos, seed=2) != queries


def test_nothing_touches_the_global_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    # beartype draws from the global generator while tests run, so `random` is taken away instead of compared
    monkeypatch.setattr("taskvec.tasks.task.random", SimpleNamespace(Random=random.Random))

    def state() -> tuple[Any, ...]:
        kind, keys, *rest = np.random.get_state()
        return kind, bytes(np.asarray(keys)), rest, torch.get_rng_state().tolist()

    before = state()
    train = load_task("country_continent").train
    train.queries(train.demonstrations(seed=3), seed=3)
    assert state() == before


def test_the_global_random_state_decides_nothing() -> None:
    def drawn(seed: int) -> tuple[Any, ...]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        task = _task(labels=("a", "b"))
        demos = task.train.demonstrations(seed=3)
        return task.examples, demos, task.train.queries(demos, seed=3)

    assert drawn(1) == drawn(2)


def test_the_loss_is_the_mean_negative_log_likelihood_of_the_answers_tokens() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    expected = [-float(torch.log(row.exp()[t] / row.exp().sum())) for row, t in zip(logits, (2, 0), strict=True)]
    loss = answer_nll(logits.to(torch.float64), torch.tensor([2, 0]))
    assert float(loss) == pytest.approx(sum(expected) / 2, abs=1e-6)
    assert answer_nll(logits.bfloat16(), torch.tensor([2, 0])).dtype == torch.float32


# --- the built-in tasks ----------------------------------------------------------------------------------------------


def test_there_are_at_least_sixteen_built_in_tasks_of_several_categories() -> None:
    assert len(BUILTIN) >= 16
    assert len({sidecar.category for sidecar in builtin_tasks().values()}) >= 4
    assert any(sidecar.labels for sidecar in builtin_tasks().values())


@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_task_is_clean(name: str) -> None:
    task, sidecar = load_task(name), builtin_tasks()[name]
    examples = task.examples
    assert len(examples) >= 100
    assert len({example.input.casefold().strip() for example in examples}) == len(examples)
    assert all(example.input.strip() and example.output.strip() for example in examples)
    assert not any("\n" in example.input + example.output for example in examples)
    assert sidecar.description.endswith(".")
    assert sidecar.category
    if sidecar.labels is not None:
        assert {example.output for example in examples} == set(sidecar.labels)
        assert len(set(sidecar.labels)) == len(sidecar.labels) > 1
    splits = [{example.input for example in split.examples} for split in (task.train, task.dev, task.test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(examples)
    assert len(task.train.demonstrations(seed=0)) == 10


@pytest.mark.parametrize("name", BUILTIN)
def test_a_built_in_task_cannot_be_answered_by_one_output(name: str) -> None:
    counts = Counter(example.output for example in load_task(name).examples)
    assert counts.most_common(1)[0][1] <= 0.5 * sum(counts.values())
