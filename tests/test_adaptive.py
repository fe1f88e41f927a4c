"""The adaptive task vector against its paper's page: plain loops with hooks of the tests' own, its identities, its
folder, its checkpoints, its controls; and the closed form against an explicit solve."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from taskvec import methods
from taskvec.comparison import compare_once
from taskvec.errors import InputError, PromptTooLong, TaskvecError, VectorCorrupt, VectorMismatch
from taskvec.evaluate import observe, score
from taskvec.evaluate.checkpoint import Checkpoint
from taskvec.evaluate.controls import source_controls
from taskvec.evaluate.expansion import MARK, AdaptiveVectors, Expansion
from taskvec.evaluate.generator import Generator, Tuning
from taskvec.evaluate.shared import shared_work
from taskvec.hooks import inject
from taskvec.lm import LM, Encoded
from taskvec.methods.adaptive import AdaptiveTaskVector
from taskvec.methods.adaptive_ridge import AdaptiveRidge
from taskvec.methods.linear import LinearTaskVector
from taskvec.prompts import Example, Prompt, PromptFormat
from taskvec.sites import Site
from taskvec.tasks import Task, TaskSpec
from taskvec.vector import Add, TaskVector, Where
from tests import tiny
from tests.reference import answer, both_families, exact_lm, ids, open_task, plus, prompt, run

SMALL = AdaptiveTaskVector(rows=6, epochs=2, batch=3, n_dev=3)
SEED = 1


@cache
def lm(family: str = "llama") -> LM:
    return tiny.tiny_lm(family)


def fit(method: Any = SMALL, model: LM | None = None, tasks: Sequence[Task] | None = None) -> AdaptiveVectors:
    some = tasks or [open_task()]
    made = method.fit(model or lm(), [one.train for one in some], [one.dev for one in some], seed=SEED)
    assert isinstance(made, AdaptiveVectors)
    return made


def prompts(model: LM | None = None) -> list[Encoded]:
    format = open_task().spec.format
    return [(model or lm()).encode(format.prompt(example.input)) for example in open_task().dev.examples[:5]]


@cache
def other_task(n_test: int = 20) -> Task:
    """Another rule, under another template."""
    format = PromptFormat.named("{input} => {output}\n", "Say it backwards.")
    words = [example.input for example in open_task().examples]
    examples = [Example(word, word[::-1]) for word in words]
    return Task.from_examples(TaskSpec("backwards", format, 3), examples, n_test=n_test)


# --- the formula -----------------------------------------------------------------------------------------------------


def states_of(family: str, texts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return torch.stack([run(exact_lm(family).model, ids(text)).head_in[-1] for text in texts]).float()


def loss_of(family: str, rows: Sequence[Tensor], examples: Sequence[Example], strength: float) -> Tensor:
    """The mean over rows of the answers' mean negative log-likelihood, each with its own rows added."""
    total = []
    for row, example in zip(rows, examples, strict=True):
        head, tail = answer(example.input, f" {example.output}\n")
        change = {layer: plus(len(head) - 1, strength * part) for layer, part in enumerate(row)}
        logits = run(exact_lm(family).model, head + tail, change).logits[len(head) - 1 : -1]
        total.append(cross_entropy(logits.float(), torch.tensor(tail)))
    return torch.stack(total).mean()


@both_families
@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_two_epochs_are_two_adam_steps_of_the_papers_loss(family: str, strength: float) -> None:
    method = AdaptiveTaskVector(rows=5, epochs=2, batch=5, n_dev=3, units="raw", strength=strength, weight_decay=0.1)
    found = fit(method, exact_lm(family))
    task = open_task()
    examples = task.train.queries((), 5, seed=SEED)
    z = states_of(family, [prompt(example.input) for example in examples])
    first = fit(replace(method, lr=1e-12, epochs=1), exact_lm(family)).expansion
    write, bias = (t.clone().requires_grad_() for t in (first.write, first.bias))
    optimizer = torch.optim.Adam([write, bias], lr=method.lr, weight_decay=0.1)
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        rows = torch.einsum("sdk,nk->nsd", write, z) + bias
        loss = loss_of(family, list(rows), examples, strength)
        write.grad, bias.grad = torch.autograd.grad(loss, (write, bias))  # the model's own stay as they are
        optimizer.step()
        dev = task.dev.examples[:3]
        rows = torch.einsum("sdk,nk->nsd", write, states_of(family, [prompt(e.input) for e in dev])) + bias
        with torch.no_grad():
            far = float(loss_of(family, list(rows), dev, strength))
        seen.append((far, write.detach().clone(), bias.detach().clone()))
    best = min(seen, key=lambda item: item[0])
    assert found.origin.found["dev_loss"] == pytest.approx(best[0], rel=1e-4)
    torch.testing.assert_close(found.expansion.write, best[1], atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(found.expansion.bias, best[2], atol=2e-5, rtol=1e-3)


@both_families
def test_what_it_writes_is_added_after_every_block_at_the_last_token(family: str) -> None:
    source = fit(SMALL, exact_lm(family))
    for example in open_task().dev.examples[:3]:
        tokens = ids(prompt(example.input))
        z = states_of(family, [prompt(example.input)])[0]
        rows = source.expansion.write @ z + source.expansion.bias
        change = {layer: plus(len(tokens) - 1, row) for layer, row in enumerate(rows)}
        with torch.no_grad():
            expected = run(exact_lm(family).model, tokens, change).logits
            with inject(exact_lm(family), source):
                found = exact_lm(family).forward(exact_lm(family).batch([Prompt(prompt(example.input))]))[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_units_are_folded_into_the_expansion() -> None:
    """In units training sees (z - centre) / spread and rows in rms of each site; what is saved sees z as it is."""
    source = fit(replace(SMALL, epochs=1, batch=6))
    expansion = source.expansion
    assert expansion.write.shape == (3, 32, 32)
    assert expansion.bias.shape == (3, 32)
    rows = source.rows(lm(), prompts())
    assert rows.abs().amax() > 0
    with torch.no_grad():
        z = Generator(lm()).states(prompts())
    torch.testing.assert_close(rows, torch.einsum("sdk,nk->nsd", expansion.write, z) + expansion.bias)


def test_a_bottleneck_has_its_rank_and_nothing_else_changes_shape() -> None:
    source = fit(replace(SMALL, rank=2))
    assert source.expansion.read is not None
    assert source.expansion.read.shape == (2, 32)
    rows = source.rows(lm(), prompts()).flatten(1) - source.expansion.bias.flatten()
    assert int(torch.linalg.matrix_rank(rows.double(), atol=1e-6)) <= 2
    assert source.origin.found["parameters"] == 2 * 32 + 3 * 32 * 2 + 3 * 32


def test_strength_and_vector_can_trade_a_factor() -> None:
    source = fit()
    halved = Expansion(source.expansion.write / 2, source.expansion.bias / 2)
    same = replace(source, expansion=halved, strength=2.0)
    with torch.no_grad(), inject(lm(), source):
        first = lm().forward(lm().batch(prompts()))
    with torch.no_grad(), inject(lm(), same):
        second = lm().forward(lm().batch(prompts()))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_an_expansion_of_zeros_is_the_bare_prompt_bit_for_bit() -> None:
    source = fit()
    zero = replace(source, expansion=Expansion(*map(torch.zeros_like, (source.expansion.write, source.expansion.bias))))
    with torch.no_grad():
        clean = lm().forward(lm().batch(prompts()))
        with inject(lm(), zero):
            assert torch.equal(lm().forward(lm().batch(prompts())), clean)


def test_all_tokens_are_the_last_one_of_a_prompt_of_one_token_only() -> None:
    everywhere = fit(replace(SMALL, where="all", layers=(0,)))
    last = replace(everywhere, where=Where())
    for batch, same in (([Encoded((5,), text="w")], True), (prompts(), False)):
        out = []
        for source in (everywhere, last):
            with torch.no_grad(), inject(lm(), source):
                out.append(lm().forward(lm().batch(batch))[:, -1])
        assert torch.allclose(out[0], out[1], atol=1e-6) == same


def test_layers_are_those_asked_for() -> None:
    source = fit(replace(SMALL, layers=(2, 0)))
    assert source.sites == (Site("resid", 2), Site("resid", 0))
    vector = source.vectors(lm(), prompts()[:1])[0]
    assert vector is not None
    assert [edit.site for edit in vector.edits] == list(source.sites)


def test_what_is_generated_follows_each_prompts_own_vector() -> None:
    source = fit(replace(SMALL, lr=0.05, epochs=4))
    texts = [Prompt(prompt(example.input)) for example in open_task().dev.examples[:4]]
    with inject(lm(), source):
        together = lm().generate(texts, max_new_tokens=3)
        alone = [lm().generate(text, max_new_tokens=3) for text in texts]
    assert together == alone


# --- many tasks ------------------------------------------------------------------------------------------------------


def test_many_tasks_are_trained_together_and_their_data_kept_away() -> None:
    tasks = [open_task(), other_task()]
    source = fit(SMALL, tasks=tasks)
    origin = source.origin
    assert origin.cost.labels == 2 * (6 + 3)
    assert origin.task == f"{tasks[0].name} + backwards"
    assert origin.kept_away == {task.spec.data_hash: task.spec.n_test for task in tasks}
    assert origin.any_format
    assert origin.demos == ()
    for task in tasks:
        assert len(observe(lm(), task.test, source).texts) == len(task.test)
    third = other_task().with_format(PromptFormat.named("qa"))
    assert len(observe(lm(), third.dev, source).texts) == len(third.dev)  # a template it has not seen


def test_one_template_stays_the_only_one() -> None:
    source = fit()
    assert not source.origin.any_format
    with pytest.raises(VectorMismatch, match="template"):
        observe(lm(), open_task().with_format(PromptFormat.named("qa")).dev, source)


def test_more_test_items_of_any_of_its_tasks_are_refused() -> None:
    source = fit(SMALL, tasks=[open_task(), other_task()])
    wider = other_task(24)
    assert wider.spec.data_hash == other_task().spec.data_hash
    with pytest.raises(InputError, match="test items kept from the vector"):
        score(lm(), wider.test, source)


@pytest.mark.parametrize(
    ("tasks", "devs", "found"),
    [((0, 0), (0, 0), "twice"), ((0, 1), (0,), "2 and 1"), ((), (), "0 and 0")],
)
def test_splits_that_do_not_belong_together_are_refused(tasks: Any, devs: Any, found: str) -> None:
    every = [open_task(), other_task()]
    with pytest.raises(InputError, match=found):
        SMALL.fit(lm(), [every[i].train for i in tasks], [every[i].dev for i in devs])


# --- generators ------------------------------------------------------------------------------------------------------


def test_it_reads_the_prompt_or_the_querys_own_words() -> None:
    own = Generator(lm())
    assert own.texts(lm(), prompts())[0].ids == prompts()[0].ids
    words = Generator(lm(), "query").texts(lm(), prompts())
    assert [text.ids for text in words] == [lm().encode(p.query).ids for p in prompts()]
    forced = replace(prompts()[0], ids=(*prompts()[0].ids, 5, 6), answer=2)
    assert own.texts(lm(), [forced])[0].ids == prompts()[0].ids


def test_states_do_not_depend_on_the_batch() -> None:
    with torch.no_grad():
        together = Generator(lm()).states(prompts())
        alone = torch.cat([Generator(lm()).states([p]) for p in prompts()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_are_read_once_in_a_bench_and_charged_each_time() -> None:
    model, alone = tiny.tiny_lm("llama"), Generator(lm()).states(prompts())
    with shared_work(model) as shared:
        found = [Generator(model).states(prompts(model)) for _ in range(2)]
        assert shared.saved == sum(len(p.ids) for p in prompts(model))
        with torch.enable_grad():  # a copy that is trained: never from memory
            assert torch.equal(Generator(model).states(prompts(model)), alone)
        assert shared.saved == sum(len(p.ids) for p in prompts(model))
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], alone, atol=1e-5, rtol=1e-5)


def test_prompts_without_text_are_refused() -> None:
    reader = Generator(lm("gpt2"), "query")
    with pytest.raises(InputError, match="prompts with their text"):
        reader.texts(lm(), [Encoded((1, 2, 3))])


def test_a_query_longer_than_the_generators_context_is_refused() -> None:
    long = Prompt("w1 " * 600)
    with pytest.raises(PromptTooLong, match="the generator"):
        Generator(lm()).texts(lm(), [Encoded(tuple([1] * 600), text=long.text)])


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model in a folder, to be named as a generator."""
    folder = tmp_path_factory.mktemp("generator") / "gpt2"
    made = tiny.tiny_lm("gpt2")
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def test_another_model_reads_and_is_named_in_the_folder(other_model: Path, tmp_path: Path) -> None:
    source = fit(replace(SMALL, generator=str(other_model)))
    assert source.generator.id == str(other_model)
    assert source.generator.fingerprint == LM.load(str(other_model)).fingerprint != lm().fingerprint
    source.save_pretrained(tmp_path / "v")
    loaded = AdaptiveVectors.from_pretrained(tmp_path / "v")
    assert torch.equal(loaded.rows(lm(), prompts()), source.rows(lm(), prompts()))


def test_a_generator_that_changed_since_is_refused(other_model: Path, tmp_path: Path) -> None:
    copied = tmp_path / "model"
    shutil.copytree(other_model, copied)
    fit(replace(SMALL, generator=str(copied))).save_pretrained(tmp_path / "v")
    changed = LM.load(str(copied))
    with torch.no_grad():
        next(changed.model.parameters()).add_(1.0)
    changed.model.save_pretrained(copied)
    with pytest.raises(VectorMismatch, match="the generator it was trained with"):
        AdaptiveVectors.from_pretrained(tmp_path / "v").rows(lm(), prompts())
    with pytest.raises(VectorMismatch, match="the generator it was trained with"):
        AdaptiveVectors.from_pretrained(tmp_path / "v").use(Generator(changed))


def test_another_target_is_refused(tmp_path: Path) -> None:
    source = fit()
    with pytest.raises(VectorMismatch, match="the model it was made for"), inject(lm("gpt2"), source):
        lm("gpt2").forward(lm("gpt2").batch(["w1 w2"]))


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_trained_generator_is_a_copy_and_comes_back_from_the_folder(tune: Any, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in lm().model.named_parameters()}
    flags = [p.requires_grad for p in lm().model.parameters()]
    source = fit(replace(SMALL, tune=tune, lora_rank=2, generator_lr=0.01, epochs=3))
    assert all(torch.equal(p, before[name]) for name, p in lm().model.named_parameters())
    assert [p.requires_grad for p in lm().model.parameters()] == flags
    assert source.tuning.weights
    frozen = replace(source, tuning=Tuning())
    assert not torch.allclose(frozen.rows(lm(), prompts()), source.rows(lm(), prompts()), atol=1e-5)
    source.save_pretrained(tmp_path / "v")
    loaded = methods.load(tmp_path / "v")
    assert isinstance(loaded, AdaptiveVectors)
    assert (loaded.tuning.kind, loaded.tuning.rank) == (tune, 2)
    torch.testing.assert_close(loaded.rows(lm(), prompts()), source.rows(lm(), prompts()))


def test_a_lora_starts_where_the_frozen_generator_stands() -> None:
    """Its B is zero at first: with no step of the generator, both are one."""
    frozen = fit(replace(SMALL, epochs=1))
    tuned = fit(replace(SMALL, epochs=1, tune="lora", generator_lr=1e-12))
    torch.testing.assert_close(tuned.expansion.write, frozen.expansion.write, atol=1e-5, rtol=1e-3)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": 0}, "adaptive.rows of at least 1"),
        ({"lr": 0.0}, "adaptive.lr above 0"),
        ({"rank": 0}, "adaptive.rank above 0"),
        ({"weight_decay": -1.0}, "adaptive.weight_decay"),
        ({"where": "at(0)"}, "last_prompt, each_last or all"),
        ({"layers": (0, 0)}, "each layer once"),
        ({"layers": (9,)}, "a layer from 0 to 2"),
        ({"generator": "no-such-model"}, "a model"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_computed(fields: Any, message: str) -> None:
    with lm().metered() as meter, pytest.raises(TaskvecError, match=message):
        fit(replace(SMALL, **fields))
    assert meter.tokens == 0


def test_a_gradient_that_is_zero_before_training_starts_is_refused() -> None:
    with pytest.raises(InputError, match=r"wanted a gradient at every layer.*resid\[0\]"):
        fit(replace(SMALL, strength=1e-50))  # beyond float32
    with pytest.raises(InputError, match="a strength that is not 0"):
        fit(replace(SMALL, strength=0.0))


def test_a_learning_rate_that_diverges_is_refused() -> None:
    with pytest.raises(InputError, match="a learning rate that trains"):
        fit(replace(SMALL, lr=float("inf")))


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "v"
    fit().save_pretrained(folder)
    return folder


def test_the_folder_gives_back_the_same_bits(saved: Path) -> None:
    loaded, made = methods.load(saved), fit()
    assert isinstance(loaded, AdaptiveVectors)
    assert loaded.source == str(saved)
    assert torch.equal(loaded.expansion.write, made.expansion.write)
    assert torch.equal(loaded.rows(lm(), prompts()), made.rows(lm(), prompts()))
    timeless = [
        o.model_copy(update={"cost": o.cost.model_copy(update={"seconds": 0.0})}) for o in (loaded.origin, made.origin)
    ]
    assert timeless[0] == timeless[1]


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_seen(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("hurt") / "v"
    shutil.copytree(saved, folder)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(VectorCorrupt):
        AdaptiveVectors.from_pretrained(folder)


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_missing_and_unknown_files_are_named(saved: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "v"
    shutil.copytree(saved, folder)
    if change == "missing":
        (folder / "expansion.safetensors").unlink()
    else:
        (folder / "more.bin").write_bytes(b"x")
    with pytest.raises(VectorCorrupt, match=f"(expansion.safetensors|more.bin) is {change}"):
        AdaptiveVectors.from_pretrained(folder)


def test_no_folder_and_an_existing_one_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=MARK):
        AdaptiveVectors.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="a new folder"):
        fit().save_pretrained(saved)


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Killed(Exception):
    """A kill, for the tests."""


@pytest.mark.parametrize("tune", ["nothing", "lora"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_training_that_was_killed_ends_with_the_same_bits(
    after: int, tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = replace(SMALL, epochs=4, patience=4, tune=tune, lora_rank=2)
    whole = fit(method)
    stopped = replace(method, checkpoint=str(tmp_path / "runs" / "c.safetensors"))
    original, count = Checkpoint.save, [0]

    def save(self: Checkpoint, *args: Any) -> None:
        original(self, *args)
        count[0] += 1
        if count[0] == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save)
        with pytest.raises(Killed):
            fit(stopped)
    resumed = fit(stopped)
    assert torch.equal(resumed.expansion.write, whole.expansion.write)
    assert torch.equal(resumed.expansion.bias, whole.expansion.bias)
    assert resumed.origin.found == whole.origin.found
    assert resumed.origin.hyperparameters == whole.origin.hyperparameters  # the file's name is none
    for name, weight in (whole.tuning.weights or {}).items():
        assert torch.equal((resumed.tuning.weights or {})[name], weight)


@pytest.mark.parametrize("fields", [{"lr": 1e-3}, {"rows": 5}, {"epochs": 3}])
def test_a_checkpoint_of_another_fit_is_refused(fields: Any, tmp_path: Path) -> None:
    method = replace(SMALL, checkpoint=str(tmp_path / "c.safetensors"))
    fit(method)
    with pytest.raises(InputError, match="a checkpoint of this very fit"):
        fit(replace(method, **fields))


def test_a_folder_keeps_a_checkpoint_for_every_fit(tmp_path: Path) -> None:
    method = replace(SMALL, checkpoint=str(tmp_path / "kept"))
    made = [fit(method), fit(replace(method, lr=1e-3))]
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert torch.equal(fit(method).expansion.write, made[0].expansion.write)
    assert not torch.equal(made[0].expansion.write, made[1].expansion.write)


@pytest.mark.parametrize("content", [b"", b"x", b"\x00" * 64])
def test_a_checkpoint_that_cannot_be_read_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="a checkpoint that can be read"):
        fit(replace(SMALL, checkpoint=str(tmp_path / "c.safetensors")))


def test_no_half_written_checkpoint_is_left(tmp_path: Path) -> None:
    fit(replace(SMALL, checkpoint=str(tmp_path / "c.safetensors")))
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


# --- the closed form -------------------------------------------------------------------------------------------------


@both_families
def test_with_the_model_as_its_own_generator_the_closed_form_is_the_linear_vector(family: str) -> None:
    model, task = exact_lm(family), open_task()
    ridge: Any = AdaptiveRidge(ridge=2.0, queries=8).fit(model, task.train, task.dev, seed=SEED)
    linear: Any = LinearTaskVector(ridge=2.0, queries=8).fit(model, task.train, task.dev, seed=SEED)
    assert ridge.origin.found["degrees_of_freedom"] == pytest.approx(
        linear.origin.found["degrees_of_freedom"], rel=1e-4
    )
    out = []
    for vector in (ridge, linear):
        with torch.no_grad(), inject(model, vector):
            out.append(model.forward(model.batch(prompts(model))))
    torch.testing.assert_close(out[0], out[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("queries", [8, 20])
def test_the_closed_form_is_the_explicit_primal_solution(queries: int, intercept: bool) -> None:
    model, task = exact_lm("llama"), open_task()
    at = ("resid[1]", "lm_head_in")
    method = AdaptiveRidge(ridge=0.5, queries=queries, at=at, intercept=intercept)
    source = method.fit(model, task.train, task.dev, seed=SEED)
    demos = task.train.demonstrations(seed=SEED)
    some = task.train.queries(demos, queries, seed=SEED)
    with torch.no_grad():
        bare = [run(model.model, ids(prompt(q.input))) for q in some]
        few = [run(model.model, ids(prompt(q.input, demos))) for q in some]
    z = torch.stack([r.head_in[-1] for r in bare]).double()
    sides = [[torch.stack([r.resid[1][-1], r.head_in[-1]]) for r in runs] for runs in (few, bare)]
    y = (torch.stack(sides[0]) - torch.stack(sides[1])).double().flatten(1)
    centre, shift = (z.mean(0), y.mean(0)) if intercept else (0 * z[0], 0 * y[0])
    x = z - centre
    primal = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(x.shape[1]).double(), x.T @ (y - shift))
    expected = ((z - centre) @ primal + shift).reshape(len(some), 2, -1)
    found = source.rows(model, [model.encode(Prompt(prompt(q.input))) for q in some])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-3)
    assert (source.expansion.read is not None) == (queries < 32)


def test_leave_one_out_chooses_the_ridge_that_refits_choose() -> None:
    model, task = exact_lm("llama"), open_task()
    chosen = AdaptiveRidge(queries=10).fit(model, task.train, task.dev, seed=SEED).origin.found["ridge"]
    assert isinstance(chosen, float)
    linear: Any = LinearTaskVector(ridge="loo", queries=10).fit(model, task.train, task.dev, seed=SEED)
    assert chosen == pytest.approx(linear.origin.found["ridge"], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": 0}, "queries of at least 1"),
        ({"ridge": 0.0}, "a finite ridge above 0"),
        ({"at": ()}, "one site or several"),
        ({"at": ("resid[0]", "resid[0]")}, "one site or several"),
        ({"at": ("embed",)}, "a site that demonstrations change"),
        ({"at": ("resid[7]",)}, "a layer from 0"),
    ],
)
def test_bad_settings_of_the_closed_form_are_refused(fields: Any, message: str) -> None:
    with lm().metered() as meter, pytest.raises(TaskvecError, match=message):
        fit(replace(AdaptiveRidge(), **fields))
    assert meter.tokens == 0


# --- controls --------------------------------------------------------------------------------------------------------


def written(source: Any, model: LM, some: Sequence[Encoded]) -> Iterator[Tensor]:
    for vector in source.vectors(model, some):
        assert isinstance(vector, TaskVector)
        yield torch.stack([edit.op.tensors()["vector"] for edit in vector.edits])


def test_the_controls_are_what_their_names_say() -> None:
    source, task = fit(replace(SMALL, epochs=3)), open_task()
    made = source_controls(lm(), "adaptive", source, task.train, other_task().train, seed=0)
    assert list(made) == ["adaptive-shuffled", "adaptive-other-task", "adaptive-task-mean", "adaptive-bias"]
    assert [c.origin.method for c in made.values() if c.origin] == list(made)
    own = list(written(source, lm(), prompts()))
    shuffled = list(written(made["adaptive-shuffled"], lm(), prompts()))
    assert all(sum(torch.equal(one, other) for other in own) == 1 for one in shuffled)
    assert not any(torch.equal(one, other) for one, other in zip(own, shuffled, strict=True))
    theirs = [lm().encode(other_task().spec.format.prompt(e.input)) for e in other_task().train.examples[: len(own)]]
    foreign = zip(written(made["adaptive-other-task"], lm(), prompts()), written(source, lm(), theirs), strict=True)
    for one, other in foreign:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    queries = [lm().encode(Prompt(prompt(example.input))) for example in task.train.examples[:64]]
    mean = made["adaptive-task-mean"]
    assert isinstance(mean, TaskVector)
    for edit, expected in zip(mean.edits, source.rows(lm(), queries).mean(0), strict=True):
        assert isinstance(edit.op, Add)
        torch.testing.assert_close(edit.op.vector, expected, atol=1e-5, rtol=1e-4)
    bias = made["adaptive-bias"]
    assert isinstance(bias, TaskVector)
    assert all(torch.equal(e.op.tensors()["vector"], b) for e, b in zip(bias.edits, source.expansion.bias, strict=True))


def test_a_table_has_the_controls_and_none_of_them_is_chosen() -> None:
    done = compare_once(lm(), open_task(), [SMALL], other=other_task())
    names = [row.method for row in done.results.rows]
    ends = ("", "-shuffled", "-other-task", "-task-mean", "-bias")
    assert [name for name in names if name.startswith("adaptive")] == [f"adaptive{end}" for end in ends]
    assert done.chosen == "adaptive"


def test_the_presets_are_the_papers() -> None:
    paper, code = AdaptiveTaskVector.paper(), AdaptiveTaskVector.code()
    assert (paper.strength, paper.lr, paper.weight_decay, paper.rows, paper.epochs) == (1e-3, 5e-4, 1e-5, 90, 15)
    assert (paper.generator, paper.tune, paper.batch, paper.where) == ("gpt2", "full", 1, "last_prompt")
    assert replace(code, where="last_prompt") == paper
    assert code.where == "all"


def test_the_published_numbers_of_parameters_are_the_expansions() -> None:
    """gpt2 -> 32 layers of width 4096: 100,794,368 with the bias (section 2 of the page)."""
    g, layers, d = 768, 32, 4096
    shapes = Expansion(torch.empty(layers, d, g, device="meta"), torch.empty(layers, d, device="meta"))
    assert sum(t.numel() for t in shapes.tensors().values()) == 100_794_368


def test_its_folder_names_what_it_holds(saved: Path) -> None:
    record = json.loads((saved / MARK).read_text())
    assert set(record["files"]) == {"expansion.safetensors", "README.md"}
    assert record["generator"]["fingerprint"] == lm().fingerprint
