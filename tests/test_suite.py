"""Suites: what a YAML file may say, where its task files are looked for, and every way to get it wrong."""

import json
from contextlib import suppress
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.errors import DataError, InputError, UnknownName, unknown
from taskvec.lm import LM
from taskvec.prompts import PromptFormat
from taskvec.tasks.read import builtin_tasks, datasets
from taskvec.tasks.suite import Suite, builtin_suites, load_suite, read_suite

STAICC = ("adaptive", "classification", "classification-more")


def task_file(path: Path, n: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"input": f"w{i}", "output": f"o{i % 7}"}) + "\n" for i in range(n)))
    return path


def suite_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text.encode("utf-8"))
    return path


# --- the built-in ones ------------------------------------------------------------------------------------------------


def test_the_built_in_suites_are_those_on_disk() -> None:
    more = ["classification", "classification-hub", "classification-more", "tiny", "words"]
    assert sorted(builtin_suites()) == ["adaptive", "adaptive-hub", *more]
    assert all(suite.name == name for name, suite in builtin_suites().items())
    assert all(suite.description for suite in builtin_suites().values())
    assert builtin_suites()["tiny"].queries == 24


@pytest.mark.parametrize("name", ["adaptive", "classification", "classification-more", "tiny", "words"])
def test_a_built_in_suite_loads_with_its_settings(name: str) -> None:
    if name in STAICC and find_spec("StaICC") is None:
        pytest.skip("the package StaICC, which holds its tasks, is not installed")
    suite = load_suite(name)
    assert all(task in {*builtin_tasks(), *datasets()} or task.startswith("tiny_") for task in suite.tasks)
    if name in STAICC:  # thousands of rows each
        suite = replaced(suite, suite.tasks[:1]).model_copy(update={"unseen": ()})
    tasks = suite.load()
    assert [task.name for task in tasks] == list(suite.tasks)
    assert {task.spec.shots for task in tasks} == {suite.shots}
    assert all(task.spec.n_test == len(task.test) <= suite.n_test for task in tasks)
    assert all((task.spec.labels is not None) == name.startswith("classification") for task in tasks)


@pytest.mark.parametrize("name", ["classification_more", "Classification-More", "CLASSIFICATION_MORE"])
def test_a_built_in_suite_has_one_name_in_any_writing(name: str) -> None:
    assert load_suite(name) is builtin_suites()["classification-more"]


def test_an_unknown_suite_names_the_nearest_and_all() -> None:
    with pytest.raises(
        UnknownName, match=r"found 'wrods'; did you mean words\? name one of: adaptive, adaptive-hub, classification"
    ) as error:
        load_suite("wrods")
    assert all(name in str(error.value) for name in builtin_suites())
    with pytest.raises(UnknownName, match=r"found '/no/such/suite.yaml'; name one of"):
        load_suite("/no/such/suite.yaml")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_suite_is_read_with_every_key(tmp_path: Path) -> None:
    text = (
        "name: mine\ndescription: Täsks\ntasks: [plural, past-tense]\nshots: 3\nn_test: 7\nqueries: 9\nformat: arrow\n"
        "unseen: [gerund]\ntogether: true\ninstruct: true\n"
    )
    suite = load_suite(suite_file(tmp_path, text))
    assert suite.model_dump() == {
        "name": "mine",
        "description": "Täsks",
        "tasks": ("plural", "past-tense"),
        "shots": 3,
        "n_test": 7,
        "queries": 9,
        "format": "arrow",
        "unseen": ("gerund",),
        "together": True,
        "instruct": True,
    }
    tasks = suite.load()
    assert [task.name for task in tasks] == ["plural", "past_tense", "gerund"]
    formats = [PromptFormat.named("arrow", builtin_tasks()[task.name].description) for task in tasks]
    assert [(task.spec.shots, len(task.test), task.spec.format) for task in tasks] == [
        (3, 7, format) for format in formats
    ]


def test_what_is_not_said_is_ten_shots_a_hundred_items_and_each_tasks_own_format(tmp_path: Path) -> None:
    suite = read_suite(suite_file(tmp_path, "name: m\ntasks: [plural, tiny_spell]\n"))
    assert (suite.shots, suite.n_test, suite.queries, suite.format, suite.description) == (10, 100, None, None, "")
    assert [task.spec.format for task in suite.load()] == [PromptFormat.named("qa"), PromptFormat.named("arrow")]


def test_task_files_are_looked_for_beside_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "suites"
    task_file(folder / "a.jsonl")
    task_file(folder / "deeper" / "b.jsonl")
    task_file(tmp_path / "c.jsonl")
    text = f"name: m\ntasks: [a.jsonl, deeper/b.jsonl, ../c.jsonl, {json.dumps(str(tmp_path / 'c.jsonl'))}, plural]\n"
    path = suite_file(folder, text)
    expected = [folder / "a.jsonl", folder / "deeper" / "b.jsonl", tmp_path / "c.jsonl", tmp_path / "c.jsonl"]
    for where, called in ((tmp_path, "suites/mine.yaml"), (folder, "mine.yaml"), (folder / "deeper", "../mine.yaml")):
        monkeypatch.chdir(where)
        for suite in (load_suite(path), load_suite(called), read_suite(Path(called))):
            assert [Path(name).resolve() for name in suite.tasks[:4]] == expected
            assert suite.tasks[4] == "plural"
            assert [task.name for task in replaced(suite, suite.tasks[:3]).load()] == ["a", "b", "c"]


def replaced(suite: Suite, tasks: tuple[str, ...]) -> Suite:
    return suite.model_copy(update={"tasks": tasks})


def test_a_file_of_the_suites_folder_stands_above_one_of_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_file(tmp_path / "x.jsonl", 40)
    task_file(tmp_path / "suites" / "x.jsonl", 60)
    path = suite_file(tmp_path / "suites", "name: m\ntasks: [x.jsonl]\n")
    monkeypatch.chdir(tmp_path)
    assert len(read_suite(path).load()[0].examples) == 60


@pytest.mark.parametrize(
    "tasks",
    ["plural, plural", "plural, Plural", "past_tense, past-tense", "plural.jsonl, plural", "a/x.jsonl, b/x.jsonl"],
)
def test_two_tasks_of_one_name_are_refused(tmp_path: Path, tasks: str) -> None:
    for name in ("plural.jsonl", "a/x.jsonl", "b/x.jsonl"):
        task_file(tmp_path / name)
    suite = read_suite(suite_file(tmp_path, f"name: m\ntasks: [{tasks}]\n"))
    with pytest.raises(InputError, match=r"wanted each task once in a suite; found (plural|past_tense|x) twice"):
        suite.load()


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"found 'past_tens'; did you mean past_tense\?"):
        Suite(name="m", tasks=("plural", "past_tens")).load()
    with pytest.raises(UnknownName, match="'gone"):
        Suite(name="m", tasks=("gone.jsonl",)).load()


def test_a_synthetic_task_is_named_too_where_it_is_nearest() -> None:
    with pytest.raises(UnknownName, match=r"did you mean tiny_spell\?"):
        Suite(name="tiny", tasks=("tiny_spel",)).load()


def test_a_task_that_is_too_small_or_bad_is_refused(tmp_path: Path) -> None:
    path = task_file(tmp_path / "few.jsonl", 12)
    with pytest.raises(DataError, match="enough examples for 10 shots"):
        Suite(name="m", tasks=(str(path),)).load()
    path.write_text("{\n")
    with pytest.raises(DataError, match="line 1"):
        Suite(name="m", tasks=(str(path),)).load()


# --- unseen tasks -----------------------------------------------------------------------------------------------------


def test_unseen_tasks_stand_behind_the_others(tmp_path: Path) -> None:
    task_file(tmp_path / "x.jsonl", 40)
    suite = read_suite(suite_file(tmp_path, "name: m\ntasks: [plural]\nunseen: [x.jsonl, gerund]\n"))
    assert [task.name for task in suite.load()] == ["plural", "x", "gerund"]
    assert suite.joint
    assert not suite.model_copy(update={"unseen": ()}).joint
    assert suite.model_copy(update={"unseen": (), "together": True}).joint


@pytest.mark.parametrize("unseen", ["plural", "Plural", "copy.jsonl"])
def test_a_task_cannot_be_seen_and_unseen(tmp_path: Path, unseen: str) -> None:
    """Not under another name either: what counts are the rows."""
    source = files("taskvec.tasks") / "data" / "plural.jsonl"
    (tmp_path / "copy.jsonl").write_text(source.read_text("utf-8"), "utf-8")
    suite = read_suite(suite_file(tmp_path, f"name: m\ntasks: [gerund, plural]\nunseen: [{unseen}]\n"))
    with pytest.raises(InputError, match=r"a task in tasks or in unseen, not in both; found (plural|copy) in both"):
        suite.load()


@pytest.mark.skipif(find_spec("StaICC") is None, reason="the package StaICC, which holds a set, is not installed")
def test_instruct_puts_descriptions_before_word_tasks_only() -> None:
    suite = Suite(name="m", tasks=("plural", "sst2"), instruct=True)
    plural, sst2 = suite.load()
    assert plural.spec.format.instruction == "Give the plural of an English noun."
    assert sst2.spec.format.instruction == ""
    bare = suite.model_copy(update={"instruct": False}).load()
    assert [task.spec.format.instruction for task in bare] == ["", ""]
    assert [task.spec.data_hash for task in bare] == [plural.spec.data_hash, sst2.spec.data_hash]


# --- formats ----------------------------------------------------------------------------------------------------------


def test_format_chat_is_the_models_own_template() -> None:
    suite = Suite(name="m", tasks=("plural", "tiny_spell"), format="chat")
    asked = list[str]()

    def chat(instruction: str) -> PromptFormat:
        asked.append(instruction)
        return PromptFormat.named("arrow", "as if it were a chat")

    assert [task.spec.format.instruction for task in suite.load(chat)] == ["as if it were a chat"] * 2
    assert asked == [""]
    with pytest.raises(InputError, match="wanted a model with a chat template"):
        suite.load()


def test_a_model_without_a_chat_template_is_refused() -> None:
    with pytest.raises(InputError, match="chat"):
        Suite(name="m", tasks=("tiny_spell",), format="chat").load(tiny_model().chat_format)


@cache
def tiny_model() -> LM:
    return LM.load("tiny")


def test_another_format_asks_for_no_chat_template() -> None:
    def never(_: str) -> PromptFormat:
        raise AssertionError

    for format in (None, "qa", "{input} => {output}\n"):
        Suite(name="m", tasks=("tiny_spell",), format=format).load(never)


@pytest.mark.parametrize("format", ["qaa", "{input}", "{output} {input}", ""])
def test_an_unknown_format_is_refused(format: str) -> None:
    with pytest.raises(InputError):
        Suite(name="m", tasks=("tiny_spell",), format=format).load()


# --- bad files --------------------------------------------------------------------------------------------------------

BAD = {
    "empty": ("", "name"),
    "a list": ("- plural\n", ""),
    "a number": ("3\n", ""),
    "text": ("plural\n", ""),
    "no tasks": ("name: m\n", "tasks"),
    "no task": ("name: m\ntasks: []\n", "tasks"),
    "one string": ("name: m\ntasks: plural\n", "tasks"),
    "a number as a task": ("name: m\ntasks: [plural, 3]\n", "tasks.1"),
    "no name": ("tasks: [plural]\n", "name"),
    "an empty name": ("name: ''\ntasks: [plural]\n", "name"),
    "no shots": ("name: m\ntasks: [plural]\nshots: 0\n", "shots"),
    "half a shot": ("name: m\ntasks: [plural]\nshots: 2.5\n", "shots"),
    "no test items": ("name: m\ntasks: [plural]\nn_test: -1\n", "n_test"),
    "no queries": ("name: m\ntasks: [plural]\nqueries: 0\n", "queries"),
    "queries in words": ("name: m\ntasks: [plural]\nqueries: many\n", "queries"),
    "a bad date": ("name: 2001-99-99\ntasks: [plural]\n", "month"),
    "no YAML": ("name: [\n", "mine.yaml"),
    "two documents": ("name: m\n---\nname: n\n", "mine.yaml"),
    "an object": ("name: !!python/object:os.system ls\n", "mine.yaml"),
    "an unknown alias": ("name: *x\n", "mine.yaml"),
    "half a surrogate": ('name: "\\ud800"\ntasks: [plural]\n', "name"),
    "a control character": ("name: \x01\n", "mine.yaml"),
    "an empty integer": ("name: !!int ''\n", "mine.yaml"),
    "no timestamp": ("name: !!timestamp x\n", "mine.yaml"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_suite_is_one_line_that_names_the_file_and_the_key(tmp_path: Path, kind: str) -> None:
    text, key = BAD[kind]
    path = suite_file(tmp_path, text)
    with pytest.raises(DataError) as error:
        load_suite(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert key in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"name: \xff\n")
    with pytest.raises(DataError):
        load_suite(path)


@pytest.mark.parametrize(
    ("key", "near"),
    [("taskss", "tasks"), ("shot", "shots"), ("n-test", "n_test"), ("querys", "queries"), ("Name", "name")],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, key: str, near: str) -> None:
    path = suite_file(tmp_path, f"name: m\ntasks: [plural]\n{key}: 3\n")
    with pytest.raises(UnknownName, match=rf"found '{key}'; did you mean {near}\? name one of: name, description, "):
        read_suite(path)


def test_an_unknown_key_like_no_other_names_all(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"found 'zzz'; name one of: name, description, tasks, shots"):
        read_suite(suite_file(tmp_path, "name: m\ntasks: [plural]\nzzz: 3\n"))


VALUES: Any = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.binary(max_size=4)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.one_of(st.sampled_from(sorted(Suite.model_fields)), st.text(max_size=5), st.integers(), st.none())
GOOD = {"name": "m", "tasks": ["plural"]}


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.booleans())
@settings(deadline=None, max_examples=50)
def test_any_yaml_is_a_suite_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, plain: dict[Any, Any], complete: bool
) -> None:
    text = yaml.safe_dump(GOOD | plain if complete else plain, allow_unicode=True)
    path = suite_file(tmp_path_factory.getbasetemp(), text.encode("utf-8", "replace").decode())
    with suppress(InputError):
        suite = read_suite(path)
        assert suite.tasks
        with suppress(InputError):
            suite.load()


@given(st.one_of(st.binary(max_size=40), st.text("{}[]:-,*&!|>?'\"#\n a1.%@`~\\x", max_size=30).map(str.encode)))
@settings(deadline=None, max_examples=100)
def test_any_bytes_are_a_suite_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "mine.yaml"
    path.write_bytes(content)
    with suppress(InputError):
        read_suite(path)


# --- the error for names ----------------------------------------------------------------------------------------------


@given(st.lists(st.text("abcdef-_", min_size=3, max_size=9), min_size=1, max_size=5, unique=True), st.data())
@settings(deadline=None, max_examples=40)
def test_a_known_name_with_one_more_letter_is_always_understood(known: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(known))
    error = unknown("a thing", name + "x", known)
    assert isinstance(error, UnknownName)
    assert "did you mean" in str(error)
    assert str(error).startswith(f"wanted a thing; found '{name}x'; ")
    assert str(error).endswith(f"name one of: {', '.join(known)}")


def test_a_name_like_nothing_known_gets_no_guess() -> None:
    assert (
        str(unknown("a thing", "qqqq", iter(["abc", "def"]))) == "wanted a thing; found 'qqqq'; name one of: abc, def"
    )
    assert str(unknown("a thing", "x", [])) == "wanted a thing; found 'x'; name one of:"
    assert "did you mean abc?" in str(unknown("a thing", "abcd", {"abc": 1, "xyz": 2}))
