"""Analyses against plain forwards: what the lens reads, what a sweep measures, what is refused."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from taskvec.analysis import ANALYSES, Beside, Subject
from taskvec.analysis.lens import MEASURES, RANDOM, alignment, lens, read, span, top_tokens
from taskvec.analysis.sweep import PASSAGE, STRENGTHS, sweep
from taskvec.cli.app import app
from taskvec.errors import InputError, VectorMismatch
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.learned import LearnedTaskVector
from taskvec.methods.linear import LinearTaskVector
from taskvec.prompts import PromptFormat
from taskvec.sites import Site
from taskvec.tasks import load_task
from taskvec.vector import Add, AddKeepNorm, Edit, TaskVector, Where
from tests import tiny
from tests.reference import both_families, label_task, open_task, run, telling_task

ROW = tiny.random_vector(32, 4)


def vector(layer: int = 0, row: Tensor = ROW, **fields: Any) -> TaskVector:
    return TaskVector((Edit(Site("resid", layer), Add(row), **fields),))


@cache
def subject(family: str = "llama", layer: int = 0) -> Subject:
    return Subject.of(tiny.tiny_lm(family), vector(layer), telling_task(), n=4, seed=1, beside=Beside(label_task()))


def value(frame: pl.DataFrame, **of: Any) -> float:
    (found,) = frame.filter(*(pl.col(name) == x for name, x in of.items()))["value"]
    return float(found)


# --- the subject -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ((), "no edit"),
        (vector().edits * 2, "add at resid"),
        ((Edit(Site("mlp", 0), Add(ROW)),), r"add at mlp\[0\]"),
        ((Edit(Site("resid", 0), AddKeepNorm(ROW, 0.1)),), "addkeepnorm"),
        ((Edit(Site("resid", 0), Add(ROW), Where("all")),), r"\(all\)"),
    ],
)
def test_what_no_formula_is_for_is_refused(edits: tuple[Edit, ...], found: str) -> None:
    with pytest.raises(InputError, match=rf"at the last prompt token; found .*{found}"):
        Subject.of(tiny.tiny_lm("llama"), TaskVector(edits), telling_task())


def test_a_vector_of_another_template_is_refused() -> None:
    lm = LM.load("tiny")
    made = LearnedTaskVector(layer=1, steps=1, n_dev=2, queries=4, batch=2)
    spell = load_task("tiny_spell", shots=4, n_test=6, format=PromptFormat.named("{input}\n= {output}\n"))
    fitted = made.fit(lm, spell.train, spell.dev)
    with pytest.raises(VectorMismatch, match="template"):
        Subject.of(lm, fitted, telling_task())


def test_one_item_is_too_few() -> None:
    with pytest.raises(InputError, match="at least two items"):
        Subject.of(tiny.tiny_lm("llama"), vector(), telling_task(), n=1)


def test_answers_that_all_begin_alike_are_refused() -> None:
    """Any vector that says the one token would be right: as where a tokenizer splits off the blank."""
    with pytest.raises(InputError, match=r"begin with different tokens; found .* before all 60 outputs"):
        Subject.of(tiny.tiny_lm("llama"), vector(), open_task())


def test_the_null_has_the_vectors_norm_and_another_direction() -> None:
    null = subject().random(0)
    torch.testing.assert_close(null.norm(), ROW.norm())
    assert abs(float(torch.cosine_similarity(null, ROW, dim=0))) < 0.6
    assert torch.equal(null, subject().random(0))
    assert not torch.equal(null, subject().random(1))


def test_strength_counts() -> None:
    twice = Subject.of(tiny.tiny_lm("llama"), vector(strength=2.0), telling_task(), n=2)
    torch.testing.assert_close(twice.direction, 2 * ROW)


# --- logit lens ------------------------------------------------------------------------------------------------------


@both_families
def test_the_last_layer_is_read_as_the_model_reads_it(family: str) -> None:
    one = subject(family)
    last = Site("resid", one.lm.n_layers - 1)
    h = one.states(one.bare, None, [last])[last]
    found = read(one, h, lambda _, logits: logits)
    for logits, prompt in zip(found, one.bare, strict=True):
        expected = run(one.lm.model, prompt.ids).logits[-1].detach()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@both_families
def test_a_layer_is_read_by_the_models_norm_and_head(family: str) -> None:
    one = subject(family)
    model = one.lm.model
    norm = model.model.norm if family == "llama" else model.transformer.ln_f
    h = tiny.random_vector(4 * 32, 9).reshape(4, 32)
    with torch.no_grad():
        expected = model.lm_head(norm(h))
    torch.testing.assert_close(read(one, h, lambda _, logits: logits), expected, atol=1e-4, rtol=1e-4)
    assert top_tokens(one, h[0], 3) == expected[0].topk(3).indices.tolist()


def test_alignment_is_the_share_of_the_norm_in_the_span() -> None:
    rows = torch.eye(5)[:2] * torch.tensor([[3.0], [0.5]])
    h = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 2, 0, 0], [3, 0, 0, 4, 0]])
    torch.testing.assert_close(alignment(span(rows), h), torch.tensor([1.0, 0.0, 0.6]))


def test_the_lens_has_every_condition_layer_and_measure() -> None:
    found = lens(subject())
    assert found.frame.shape == (4 * subject().lm.n_layers * 4, 6)
    assert set(found.frame["measure"]) == {*MEASURES, RANDOM}
    assert (found.frame["low"] <= found.frame["value"]).all()
    assert (found.frame["value"] <= found.frame["high"]).all()
    assert found.picture.svg.startswith("<?xml")


def test_accuracy_and_logit_difference_at_the_end_are_the_models_own() -> None:
    lm, task = LM.load("tiny"), load_task("tiny_vowel", shots=4, n_test=6)
    one = Subject.of(lm, vector(1, tiny.random_vector(64, 3)), task, n=6)
    found = lens(one)
    assert len(one.labels) == 5
    with inject(one.lm, one.vector), torch.no_grad():
        logits = torch.stack([one.lm.forward(one.lm.batch([prompt]))[0, -1] for prompt in one.bare])
    hits = float(np.mean([int(row.argmax()) == gold for row, gold in zip(logits, one.golds, strict=True)]))
    apart = []
    for row, gold in zip(logits, one.golds, strict=True):
        apart.append(float(row[gold] - row[[label for label in one.labels if label != gold]].mean()))
    end = {"condition": "vector", "layer": one.lm.n_layers - 1}
    assert value(found.frame, measure="accuracy", **end) == pytest.approx(hits)
    assert value(found.frame, measure="logit difference", **end) == pytest.approx(np.mean(apart), abs=1e-4)


def test_layers_below_the_vector_are_as_without_it() -> None:
    found = lens(subject(layer=1)).frame
    for measure in MEASURES:
        one, two = (value(found, condition=name, layer=0, measure=measure) for name in ("vector", "zero-shot"))
        assert one == pytest.approx(two, abs=1e-5)
    at_it = [value(found, condition=name, layer=1, measure="alignment") for name in ("vector", "zero-shot")]
    assert at_it[0] != pytest.approx(at_it[1], abs=1e-4)


# --- layer and strength ----------------------------------------------------------------------------------------------


def test_a_sweep_has_every_setting_and_its_null() -> None:
    found = sweep(subject()).frame
    assert found.shape == (2 * subject().lm.n_layers * len(STRENGTHS) * 4 + 3, 7)


def test_a_sweep_shows_what_becomes_of_another_task() -> None:
    one = subject()
    prompts, golds = one.others
    change = {2: lambda h: torch.cat([h[:-1], h[-1:] + 2 * ROW])}
    hits = [int(run(one.lm.model, p.ids, change).logits[-1].argmax()) == g for p, g in zip(prompts, golds, strict=True)]
    found = sweep(one)
    at = {"vector": "vector", "layer": 2, "strength": 2.0, "measure": f"accuracy on {label_task().name}"}
    assert value(found.frame, **at) == pytest.approx(float(np.mean(hits)))
    assert f"few-shot {label_task().name} goes" in found.says


def test_damage_is_the_loss_of_a_passage_with_the_vector_everywhere() -> None:
    one = subject()
    ids = list(one.lm.encode(PASSAGE).ids)
    clean = run(one.lm.model, ids).logits.detach()
    moved = run(one.lm.model, ids, {1: lambda h: h + 2 * ROW}).logits.detach()
    losses = [cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none") for logits in (clean, moved)]
    found = sweep(one).frame
    expected = float((losses[1] - losses[0]).mean())
    assert value(found, vector="vector", layer=1, strength=2.0, measure="damage") == pytest.approx(expected, abs=1e-4)


def test_a_sweeps_accuracy_and_distance_are_those_of_plain_passes() -> None:
    one = subject()
    change = {1: lambda h: torch.cat([h[:-1], h[-1:] + 4 * ROW])}
    moved = [run(one.lm.model, prompt.ids, change).logits[-1].detach() for prompt in one.bare]
    few = [run(one.lm.model, prompt.ids).logits[-1].detach() for prompt in one.behind]
    hits = np.mean([int(row.argmax()) == gold for row, gold in zip(moved, one.golds, strict=True)])
    far = []
    for a, b in zip(few, moved, strict=True):
        far.append(float((a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()))
    found, at = sweep(one).frame, {"vector": "vector", "layer": 1, "strength": 4.0}
    assert value(found, measure="accuracy", **at) == pytest.approx(hits)
    assert value(found, measure="d_ntp_full", **at) == pytest.approx(np.mean(far), abs=1e-4)


# --- the command -----------------------------------------------------------------------------------------------------


ASKED = ["analyze", "--against", "tiny_next_vowel"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, task = tmp_path_factory.mktemp("made") / "v", load_task("tiny_upper", shots=4, n_test=8)
    made = LearnedTaskVector(layer=1, steps=3, n_dev=2, queries=8, batch=4).fit(LM.load("tiny"), task.train, task.dev)
    made.save_pretrained(path)
    return path


def test_the_command_writes_pictures_frames_and_a_page(folder: Path, tmp_path: Path) -> None:
    run_ = CliRunner().invoke(app, [*ASKED, str(folder), "--out", str(tmp_path / "run"), "--n", "8", "--json"])
    assert run_.exit_code == 0, run_.output
    found = json.loads(run_.stdout)
    assert set(found["left_out"]) == {"geometry"}  # there is no library
    assert "--beside" in found["left_out"]["geometry"]
    made = [name for name in ANALYSES if name != "geometry"]
    assert {Path(path).name for path in found["files"]} == {
        *(f"{name}.{end}" for name in made for end in ("svg", "csv")),
        "says.json",
        "report.html",
    }
    assert set(found["rows"]) == set(found["says"]) == set(made)
    for name in made:
        assert pl.read_csv(tmp_path / "run" / f"{name}.csv").shape[0] == len(found["rows"][name])
    assert found["says"]["lens"].split(";")[0] in (tmp_path / "run" / "report.html").read_text()


def test_one_analysis_may_be_asked_for(folder: Path, tmp_path: Path) -> None:
    asked = ["analyze", str(folder), "--out", str(tmp_path / "run"), "--n", "2", "--what", "lens"]
    run_ = CliRunner().invoke(app, asked)
    assert run_.exit_code == 0, run_.output
    assert run_.stdout.startswith("Logit lens: What the stream says")
    assert not (tmp_path / "run" / "sweep.csv").exists()


def test_what_was_asked_for_by_name_is_not_left_out(folder: Path, tmp_path: Path) -> None:
    asked = ["analyze", str(folder), "--out", str(tmp_path / "run"), "--n", "4", "--what", "geometry", "--what", "lens"]
    run_ = CliRunner().invoke(app, asked)
    assert "at least 3 other vectors" in str(run_.exception)


def test_a_library_is_named_by_its_folders(folder: Path, tmp_path: Path) -> None:
    task, lm, beside = load_task("tiny_spell", shots=4, n_test=8), LM.load("tiny"), list[str]()
    for seed in range(3):
        made = LearnedTaskVector(layer=1, steps=1, n_dev=2, queries=8, batch=4).fit(lm, task.train, task.dev, seed=seed)
        made.save_pretrained(tmp_path / str(seed))
        beside += ["--beside", str(tmp_path / str(seed))]
    asked = [*ASKED, str(folder), *beside, "--out", str(tmp_path / "run"), "--n", "4", "--what", "geometry"]
    run_ = CliRunner().invoke(app, asked)
    assert run_.exit_code == 0, run_.output
    assert run_.stdout.startswith("Geometry of a library: 4 vectors of 2 tasks.")


def test_an_unknown_analysis_names_its_neighbour(folder: Path, tmp_path: Path) -> None:
    run_ = CliRunner().invoke(app, ["analyze", str(folder), "--out", str(tmp_path), "--what", "lense"])
    assert "did you mean lens?" in str(run_.exception)


def test_a_vector_of_another_kind_is_refused(tmp_path: Path) -> None:
    task = load_task("tiny_upper", shots=4, n_test=8)
    LinearTaskVector(queries=8).fit(LM.load("tiny"), task.train, task.dev).save_pretrained(tmp_path / "v")
    run_ = CliRunner().invoke(app, ["analyze", str(tmp_path / "v"), "--out", str(tmp_path / "run")])
    assert "one vector added at resid[l]" in str(run_.exception)
    assert not (tmp_path / "run").exists()
