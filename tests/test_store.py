"""The vector folder: exact round trips, all or nothing, and every change to it refused."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import taskvec
from taskvec.errors import InputError, TaskvecError, VectorCorrupt
from taskvec.prompts import Example, PromptFormat
from taskvec.sites import Site
from taskvec.vector import (
    Add,
    AddKeepNorm,
    Affine,
    Blend,
    Cost,
    Edit,
    ModelId,
    Op,
    Origin,
    Replace,
    TaskVector,
    Where,
    store,
)
from taskvec.vector.origin import FormatRecord

TENSORS, CONFIG, CARD = "task_vector.safetensors", "task_vector_config.json", "README.md"
FILES = {TENSORS, CONFIG, CARD}


def _noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _origin() -> Origin:
    return Origin(
        method="learned",
        hyperparameters={"lr": 0.1, "layers": [1, 2], "loss": None, "deep": {"on": True, "name": "ä\u2028"}, "n": 3},
        model=ModelId(id="some/model", revision="abc", fingerprint="f" * 64),
        tokenizer_hash="t" * 64,
        format=FormatRecord.of(PromptFormat("X: {input}\nY: {output}\n", 'Do "it".', "custom", False)),
        task="past_tense",
        data_hash="d" * 64,
        labels=("no", "yes", "très"),
        seed=7,
        demos=(Example("walk", "walked"), Example("{input}\n", '"\\\U0001f600')),
        prompt="few-shot",
        max_new_tokens=9,
        cost=Cost(labels=45, queries=3, tokens=12345, seconds=0.1 + 0.2),
        versions={"torch": "2.13.0"},
    )


def _vector(origin: Origin | None = None) -> TaskVector:
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45], dtype=torch.float32)
    edits = (
        Edit(Site("resid", 11), Add(_noise(4, seed=1))),
        Edit(Site("attn", 0), Replace(_noise(4, seed=2, dtype=torch.bfloat16)), Where("each_last"), 0.1 + 0.2),
        Edit(Site("mlp", 3), Blend(special, keep=1 / 3, weight=-1e-300), Where("all"), -1.0),
        Edit(Site("heads", 2, 5), Affine(_noise(2, 4, seed=3), _noise(2, 4, seed=4)), Where("role", role="separator")),
        Edit(
            Site("embed"),
            Affine(_noise(1, 4, seed=5), _noise(1, 4, seed=6), _noise(4, seed=7, dtype=torch.float64)),
            Where("at", positions=(0, -2)),
            0.0,
        ),
        Edit(Site("lm_head_in"), AddKeepNorm(_noise(4, seed=8, dtype=torch.float16)), strength=1e10),
    )
    return TaskVector(edits, origin)


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).flatten().tolist())


def _assert_same(loaded: TaskVector, saved: TaskVector) -> None:
    assert loaded.origin == saved.origin
    assert len(loaded.edits) == len(saved.edits)
    for new, old in zip(loaded.edits, saved.edits, strict=True):
        assert (new.site, new.where, new.strength, type(new.op)) == (old.site, old.where, old.strength, type(old.op))
        assert new.op.numbers() == old.op.numbers()
    assert list(loaded.tensors()) == list(saved.tensors())
    for name, tensor in loaded.tensors().items():
        before = saved.tensors()[name]
        assert (tensor.dtype, tensor.shape, _bits(tensor)) == (before.dtype, before.shape, _bits(before))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the configuration as someone would who knows how its checksum is made."""
    path = folder / CONFIG
    plain = json.loads(path.read_bytes())
    change(plain)
    rest = {key: value for key, value in plain.items() if key != "checksum"}
    plain["checksum"] = hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    path.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", "utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved vector with every op and place."""
    _vector(_origin()).save_pretrained(tmp_path / "vector")
    return tmp_path / "vector"


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [None, _origin()])
def test_a_vector_is_loaded_exactly_as_it_was_saved(tmp_path: Path, origin: Origin | None) -> None:
    vector = _vector(origin)
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    _assert_same(loaded, vector)
    assert loaded.source == str(tmp_path / "v")
    if origin is not None:
        assert loaded.origin is not None
        assert loaded.origin.shown == origin.demos == loaded.origin.demos
        assert loaded.origin.format.format() == PromptFormat("X: {input}\nY: {output}\n", 'Do "it".', "custom", False)


def test_a_vector_without_edits_is_saved_too(tmp_path: Path) -> None:
    vector = TaskVector((), _origin())
    vector.save_pretrained(tmp_path / "v")
    _assert_same(TaskVector.from_pretrained(str(tmp_path / "v")), vector)


def test_tensors_that_are_views_or_have_gradients_are_saved_by_value(tmp_path: Path) -> None:
    table = _noise(4, 6).requires_grad_(True)
    vector = TaskVector((Edit(Site("resid", 0), Add(table[:, 1])), Edit(Site("resid", 1), Add(table.T[1]))))
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert [t.tolist() for t in loaded.tensors().values()] == [table[:, 1].tolist()] * 2
    assert not any(t.requires_grad for t in loaded.tensors().values())


def test_saving_what_was_loaded_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    TaskVector.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert _contents(tmp_path / "again") == _contents(folder)


def test_the_folder_has_three_files_and_nothing_stands_beside_it(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    assert list(folder.parent.iterdir()) == [folder]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_missing_parents_are_made(tmp_path: Path) -> None:
    _vector().save_pretrained(tmp_path / "a" / "b" / "v")
    assert {path.name for path in (tmp_path / "a" / "b" / "v").iterdir()} == FILES


def test_the_configuration_is_readable_json_with_a_hash_of_everything(folder: Path) -> None:
    plain = json.loads((folder / CONFIG).read_text("utf-8"))
    assert plain["format_version"] == 1
    assert plain["files"] == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (TENSORS, CARD)
    }
    assert set(plain["tensors"]) == set(_vector().tensors())
    assert [edit["op"] for edit in plain["edits"]] == ["add", "replace", "blend", "affine", "affine", "add-keep-norm"]
    assert plain["origin"]["demos"][0] == {"input": "walk", "output": "walked"}


def test_the_card_names_the_edits_the_origin_and_how_to_use_it(folder: Path) -> None:
    card = (folder / CARD).read_text("utf-8")
    for part in ("base_model: some/model", "`Add` at `resid[11]`", "`at(0,-2)`", "method: learned, seed 7", "inject("):
        assert part in card


def test_an_own_card_is_written_as_given(tmp_path: Path) -> None:
    _vector().save_pretrained(tmp_path / "v", card="# é\r\nmine")
    assert (tmp_path / "v" / CARD).read_bytes() == "# é\r\nmine".encode()
    TaskVector.from_pretrained(tmp_path / "v")


# --- what is refused when saving -------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_left_alone(folder: Path) -> None:
    before = _contents(folder)
    with pytest.raises(InputError, match="overwrite"):
        TaskVector(()).save_pretrained(folder)
    assert _contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_that_is_no_vector_is_never_overwritten(tmp_path: Path, kind: str, overwrite: bool) -> None:
    other = tmp_path / "other"
    kept = other / "thesis.tex" if kind == "folder" else other
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("years of work")
    with pytest.raises(InputError):
        _vector().save_pretrained(other, overwrite=overwrite)
    assert kept.read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [other]


def test_an_empty_folder_may_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    with pytest.raises(InputError):
        _vector().save_pretrained(tmp_path / "v")
    _vector().save_pretrained(tmp_path / "v", overwrite=True)
    _assert_same(TaskVector.from_pretrained(tmp_path / "v"), _vector())


def test_overwriting_replaces_the_whole_vector(folder: Path) -> None:
    new = TaskVector((Edit(Site("resid", 1), Add(_noise(3, seed=20))),))
    new.save_pretrained(folder, overwrite=True)
    _assert_same(TaskVector.from_pretrained(folder), new)
    assert {path.name for path in folder.iterdir()} == FILES
    assert list(folder.parent.iterdir()) == [folder]


def test_overwriting_a_damaged_vector_repairs_it(folder: Path) -> None:
    (folder / TENSORS).unlink()
    _vector().save_pretrained(folder, overwrite=True)
    _assert_same(TaskVector.from_pretrained(folder), _vector())


class _Double(Op):
    vector: Tensor

    def __init__(self) -> None:
        object.__setattr__(self, "vector", _noise(4))

    def apply(self, h: Tensor) -> Tensor:
        return 2 * h


class _LikeAdd(Add):
    """A subclass of an op of the closed set is not of the set: it would be loaded as its parent."""


@pytest.mark.parametrize("op", [_Double(), _LikeAdd(_noise(4))])
def test_an_op_outside_the_closed_set_is_not_saved(tmp_path: Path, op: Op) -> None:
    with pytest.raises(InputError, match=f"found {type(op).__name__}") as caught:
        TaskVector((Edit(Site("resid", 0), op),)).save_pretrained(tmp_path / "v")
    assert "add-keep-norm" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edit(Site("resid", 0), Add(_noise(4)), strength=float("nan")),
        lambda: Edit(Site("resid", 0), Add(_noise(4)), strength=float("inf")),
        lambda: Edit(Site("resid", 0), Blend(_noise(4), keep=float("-inf"))),
        lambda: Edit(Site("resid", -1), Add(_noise(4))),
        lambda: Edit(Site("resid", 0), Add(_noise(4)), Where("at")),
        lambda: Edit(Site("resid", 0), Add(_noise(4)), Where("role", role="two words")),
        lambda: Edit(Site("resid", 0), Add(_noise(4)), Where("all", role="separator")),
    ],
)
def test_an_edit_that_could_not_be_read_back_is_not_saved(tmp_path: Path, make: Callable[[], Edit]) -> None:
    with pytest.raises(InputError):
        TaskVector((make(),)).save_pretrained(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_origin_that_could_not_be_read_back_is_not_saved(tmp_path: Path, number: float) -> None:
    origin = _origin().model_copy(update={"hyperparameters": {"lr": number}})
    with pytest.raises(InputError):
        TaskVector((), origin).save_pretrained(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_an_op_whose_number_was_given_as_an_integer_is_loaded_with_it(tmp_path: Path) -> None:
    op = Blend(_noise(4))
    object.__setattr__(op, "keep", 1)  # past beartype, which only the tests have
    TaskVector((Edit(Site("resid", 0), op),)).save_pretrained(tmp_path / "v")
    loaded: Any = TaskVector.from_pretrained(tmp_path / "v").edits[0].op
    assert (loaded.keep, loaded.weight) == (1.0, 0.5)


# --- interruptions ---------------------------------------------------------------------------------------------------


def _interrupted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The call with that number of `owner.name` raises KeyboardInterrupt; all others work."""
    real, calls = getattr(owner, name), [0]

    def fake(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fake)


write_steps = pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (store, "_write", 1),
        (store, "save_tensors", 1),
        (Path, "write_bytes", 1),
        (Path, "write_bytes", 2),
        (Path, "write_bytes", 3),
        (Path, "chmod", 1),
        (os, "replace", 1),
    ],
)


@write_steps
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    with monkeypatch.context() as patch:
        _interrupted(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            _vector().save_pretrained(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


@write_steps
def test_an_interrupted_overwrite_keeps_the_old_vector(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int
) -> None:
    with monkeypatch.context() as patch:
        _interrupted(patch, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            TaskVector(()).save_pretrained(folder, overwrite=True)
    _assert_same(TaskVector.from_pretrained(folder), _vector(_origin()))
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_overwrite_that_fails_between_its_two_moves_puts_the_old_vector_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    real = os.replace

    def fake(source: Path, target: Path) -> None:
        if (
            not failures
            and Path(target) == folder
            and not folder.exists()
            and {p.name for p in Path(source).iterdir()} == FILES
        ):
            failures.append(source)
            raise error("no")
        real(source, target)

    failures: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fake)
        with pytest.raises(error):
            TaskVector(()).save_pretrained(folder, overwrite=True)
    assert len(failures) == 1
    _assert_same(TaskVector.from_pretrained(folder), _vector(_origin()))
    assert list(folder.parent.iterdir()) == [folder]


# --- what is refused when loading ------------------------------------------------------------------------------------


def test_no_folder_is_an_input_error(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="wanted a vector folder"):
            TaskVector.from_pretrained(place)


@pytest.mark.parametrize("name", sorted(FILES))
@given(data=st.data())
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_changed_byte_is_refused(folder: Path, name: str, data: st.DataObject) -> None:
    path = folder / name
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b' \n\r\t01e."{}'))))
    bad = bytearray(good)
    bad[at] = new if new != good[at] else new ^ 1
    path.write_bytes(bytes(bad))
    try:
        with pytest.raises(VectorCorrupt, match=re.escape(str(folder))):
            TaskVector.from_pretrained(folder)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_first_and_last_bytes_count_too(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    for bad in (good[1:], good[:-1], b"", good[: len(good) // 2], good + b"\n", good + b"\0", b" " + good):
        (folder / name).write_bytes(bad)
        with pytest.raises(VectorCorrupt):
            TaskVector.from_pretrained(folder)


def test_white_space_in_the_configuration_counts(folder: Path) -> None:
    good = (folder / CONFIG).read_bytes()
    for bad in (good.replace(b"\n", b"\r\n"), good.replace(b"\n", b" "), json.dumps(json.loads(good)).encode()):
        (folder / CONFIG).write_bytes(bad)
        with pytest.raises(VectorCorrupt, match=CONFIG):
            TaskVector.from_pretrained(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError if name == CONFIG else VectorCorrupt, match=re.escape(name)):
        TaskVector.from_pretrained(folder)


def test_an_extra_file_or_folder_is_named(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"x")
    with pytest.raises(VectorCorrupt, match=r"model\.bin is unknown"):
        TaskVector.from_pretrained(folder)
    (folder / "model.bin").unlink()
    (folder / "more").mkdir()
    with pytest.raises(VectorCorrupt, match="more is unknown"):
        TaskVector.from_pretrained(folder)


def test_files_exchanged_between_two_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    other = TaskVector((Edit(Site("resid", 11), Add(_noise(4, seed=30))),))
    for name in FILES:
        other.save_pretrained(tmp_path / "other", overwrite=True, card="other")
        (tmp_path / "other" / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(VectorCorrupt):
            TaskVector.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_another_format_version_is_refused_by_number(folder: Path, version: Any) -> None:
    _reseal(folder, lambda plain: plain.update(format_version=version))
    with pytest.raises(VectorCorrupt, match=CONFIG):
        TaskVector.from_pretrained(folder)


def test_a_newer_format_version_is_said_to_be_one(folder: Path) -> None:
    _reseal(folder, lambda plain: plain.update(format_version=2, unheard_of={}))
    with pytest.raises(VectorCorrupt, match="format version 2, this taskvec reads 1"):
        TaskVector.from_pretrained(folder)


def test_resealing_nothing_is_accepted(folder: Path) -> None:
    """The tests below would pass for a wrong reason if the helper made unreadable folders."""
    before = (folder / CONFIG).read_bytes()
    _reseal(folder, lambda plain: None)
    assert (folder / CONFIG).read_bytes() == before
    _reseal(folder, lambda plain: plain["edits"][0].update(strength=3.0))
    assert TaskVector.from_pretrained(folder).edits[0].strength == 3.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p["edits"][0].update(op="multiply"), "multiply"),
        (lambda p: p["edits"][0].update(site="block[3]"), r"block\[3\]"),
        (lambda p: p["edits"][0].update(where="sometimes"), "sometimes"),
        (lambda p: p["edits"][0].update(op="affine"), "an edit that cannot be"),
        (lambda p: p["edits"][2]["numbers"].update(extra=1.0), "an edit that cannot be"),
        (lambda p: p["edits"][0].update(tensors=[]), "an edit that cannot be"),
        (lambda p: p["edits"][0].update(tensors=["absent"]), "absent"),
        (lambda p: p["edits"][0].update(strength=None), "strength"),
        (lambda p: p["edits"][0].update(weight=1), "weight"),
        (lambda p: p.update(unheard_of=1), "unheard_of"),
        (lambda p: p["origin"].update(unheard_of=1), "unheard_of"),
        (lambda p: p["origin"]["model"].pop("fingerprint"), "fingerprint"),
        (lambda p: p.pop("edits"), "edits"),
        (lambda p: p["tensors"].pop("0.vector"), r"0\.vector is unknown"),
        (lambda p: p["tensors"].update({"9.vector": "0" * 64}), r"9\.vector is missing"),
        (lambda p: p["tensors"].update({"0.vector": "0" * 64}), r"0\.vector was changed"),
        (lambda p: p["files"].update({CARD: "0" * 64}), CARD),
        (lambda p: p["files"].update({TENSORS: "0" * 64}), TENSORS),
        (lambda p: p["files"].pop(CARD), CARD),
    ],
)
def test_what_the_configuration_may_not_say_is_named(
    folder: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    _reseal(folder, change)
    with pytest.raises(VectorCorrupt, match=named):
        TaskVector.from_pretrained(folder)


def test_a_changed_value_without_a_new_checksum_is_refused(folder: Path) -> None:
    text = (folder / CONFIG).read_text("utf-8")
    assert text.count('"seed": 7') == 1
    (folder / CONFIG).write_text(text.replace('"seed": 7', '"seed": 8'), "utf-8")
    with pytest.raises(VectorCorrupt, match="checksum"):
        TaskVector.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [b"null", b"[]", b"1", b'"text"', b"{}", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"format_version": 1}'],
)
def test_a_configuration_of_another_kind_is_refused(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(VectorCorrupt, match=CONFIG):
        TaskVector.from_pretrained(folder)


@given(content=st.binary(max_size=200))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", sorted(FILES))
def test_any_other_content_is_refused_with_an_error_of_ours(folder: Path, name: str, content: bytes) -> None:
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        with pytest.raises(TaskvecError):
            TaskVector.from_pretrained(folder)
    finally:
        (folder / name).write_bytes(good)


def test_nothing_in_the_package_reads_or_writes_pickles() -> None:
    sources = list(Path(taskvec.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    unsafe = re.compile(r"\bpickle\b|torch\.(load|save)\b|\b(joblib|dill|marshal|shelve)\b|allow_pickle")
    found = {
        f"{path.name}:{number}: {line.strip()}"
        for path in sources
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if path.name != "staicc.py"  # it reads plain data only: tests/test_staicc.py
        if unsafe.search(line) and not line.strip().startswith(("#", '"""'))
    }
    assert found == set()
