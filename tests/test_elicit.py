"""ELICIT against its description (baselines.md, section 7): a plain BM25, plain states, plain sums; and its folder."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizerFast

from taskvec import methods
from taskvec.errors import InputError, MissingPackage, VectorCorrupt
from taskvec.evaluate import observe, score
from taskvec.evaluate.drawing import draw
from taskvec.hooks import inject
from taskvec.lm import LM
from taskvec.methods.elicit import MARK, Elicit, ElicitLibrary
from taskvec.methods.prompted import ZeroShot
from taskvec.prompts import Example, PromptFormat
from taskvec.sites import Site
from taskvec.tasks import Dev, Task
from taskvec.vector import Add, Edit, Origin, TaskVector, VectorSource, Where
from tests import tiny
from tests.reference import best_of, exact_lm, ids, label_task, open_task, plus, prompt, run

WIDTH = 32
SMALL = Elicit(others=(), prompts=3, n_dev=6)


# --- the reference ----------------------------------------------------------------------------------------------------


def bm25(query: str, documents: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Okapi BM25 as Lucene computes it: idf = ln(1 + (N - df + 1/2) / (df + 1/2)), no factor k1 + 1."""
    texts = [document.lower().split() for document in documents]
    middle = sum(len(text) for text in texts) / len(texts)
    out = []
    for text in texts:
        total = 0.0
        for word in query.lower().split():
            df = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            tf = text.count(word)
            total += idf * tf / (tf + k1 * (1 - b + b * len(text) / middle))
        out.append(total)
    return out


def moved(query: str, shift: Tensor | None, layer: int = 1) -> Tensor:
    """The last logits of a zero-shot prompt, `shift` added to a block's output at the last token."""
    tokens = ids(prompt(query))
    change = {} if shift is None else {layer: plus(len(tokens) - 1, shift.double())}
    with torch.no_grad():
        return run(exact_lm("llama").model, tokens, change).logits[-1]


# --- libraries by hand ------------------------------------------------------------------------------------------------


@cache
def origin() -> Origin:
    found = ZeroShot().fit(exact_lm("llama"), open_task().train, open_task().dev).origin
    assert found is not None
    return found


def theta(seed: int) -> Tensor:
    return tiny.random_vector(WIDTH, seed)


def entry(seed: int, text: str, layer: int = 1) -> TaskVector:
    """An entry whose demonstrations' words are `text`."""
    head, _, tail = text.partition(" ")
    made = origin().model_copy(update={"demos": (Example(head, tail),)})
    return TaskVector((Edit(Site("resid", layer), Add(theta(seed)), strength=2.0),), made)


def library(texts: Sequence[str], threshold: float = 0.0, layers: Sequence[int] = (), **fields: Any) -> ElicitLibrary:
    places = layers or [1] * len(texts)
    entries = [entry(i, text, layer) for i, (text, layer) in enumerate(zip(texts, places, strict=True))]
    return ElicitLibrary(tuple(entries), origin(), threshold, **fields)


def vectors(source: ElicitLibrary, *queries: str) -> list[TaskVector | None]:
    lm, format = exact_lm("llama"), PromptFormat.named("arrow")
    return source.vectors(lm, [lm.encode(format.prompt(query)) for query in queries])


def shift_of(vector: TaskVector | None) -> Tensor | None:
    """What a vector of one add edit at the last prompt token adds."""
    if vector is None:
        return None
    (edit,) = vector.edits
    assert isinstance(edit.op, Add)
    assert edit.where == Where()
    return edit.strength * edit.op.vector


def assert_mean(vector: TaskVector | None, seeds: Sequence[int]) -> None:
    """2 x the mean of these entries."""
    shift = shift_of(vector)
    assert shift is not None
    torch.testing.assert_close(shift, 2 * torch.stack([theta(seed) for seed in seeds]).mean(0))


# --- BM25 -------------------------------------------------------------------------------------------------------------

words = st.sampled_from(["red", "blue", "Walk", "walk", "q1", "of", "THE", "the", "sea"])
texts = st.lists(st.lists(words, min_size=1, max_size=8).map(" ".join), min_size=1, max_size=6)


@given(documents=texts, query=st.lists(words, min_size=1, max_size=5).map(" ".join))
@settings(deadline=None, max_examples=60)
def test_scores_and_ranking_are_those_of_bm25(documents: list[str], query: str) -> None:
    expected = bm25(query, documents)
    got = library(documents, -1.0).scores(exact_lm("llama"), [query, query])
    assert got.shape == (2, len(documents))
    assert got[0].tolist() == pytest.approx(expected, abs=1e-5)
    near = library(documents, -1.0, top=99).nearest(got[1])
    assert sorted(near) == [i for i, value in enumerate(expected) if value > 1e-9]
    assert [expected[i] for i in near] == pytest.approx(sorted((expected[i] for i in near), reverse=True), abs=1e-5)


def test_inputs_and_outputs_of_all_demonstrations_are_compared() -> None:
    made = origin().model_copy(update={"demos": (Example("red", "blue"), Example("sea green", "Walk"))})
    one = replace(entry(0, "x"), origin=made)
    source = ElicitLibrary((one, entry(1, "other words")), origin(), 0.0)
    expected = bm25("walk blue sea", ["red blue\nsea green Walk", "other words"])
    assert source.scores(exact_lm("llama"), ["walk blue sea"])[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_templates_words_do_not_count() -> None:
    """Each prompt holds "->", and so does this entry: it is no word of the query."""
    source = library(["-> arrow", "red blue"])
    assert vectors(source, "walk")[0] is None
    assert_mean(vectors(source, "red")[0], [1])


def test_entries_without_a_word_of_the_query_are_never_retrieved() -> None:
    for threshold in (-1.0, 0.0):
        source = library(["red blue", "walk talk"], threshold)
        assert vectors(source, "sea") == [None]
        assert_mean(vectors(source, "talk")[0], [1])


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_a_query_without_words_retrieves_nothing(text: str) -> None:
    lm, source = exact_lm("llama"), library(["red blue", "walk talk"], -1.0)
    assert vectors(source, text) == [None]
    assert source.scores(lm, [text]).tolist() == [[0.0, 0.0]]
    if text:  # a plain prompt, whose whole text is the query
        assert source.vectors(lm, [lm.encode(text)]) == [None]


# --- what is retrieved ------------------------------------------------------------------------------------------------


def test_a_score_at_the_threshold_is_near_enough_and_one_below_is_not() -> None:
    documents = ["red blue sea", "walk red", "of the"]
    scores = library(documents).scores(exact_lm("llama"), ["red"])[0]
    best = float(scores.max())
    assert 0 < float(scores[0]) < best  # the shorter text weighs the word more
    assert_mean(vectors(library(documents, best), "red")[0], [1])
    assert vectors(library(documents, best * (1 + 1e-6)), "red") == [None]
    assert_mean(vectors(library(documents, float(scores[0])), "red")[0], [0, 1])


def test_only_the_best_top_entries_count() -> None:
    documents = ["red", "red a", "red a b", "red a b c", "other"]
    for top in (1, 2, 3, 99):
        assert_mean(vectors(library(documents, top=top), "red")[0], range(min(top, 4)))


def test_the_commonest_layer_wins_and_entries_of_others_drop_out() -> None:
    documents = ["red", "red a", "red a b", "red a b c"]
    (vector,) = vectors(library(documents, layers=[0, 2, 2, 1]), "red")
    assert vector is not None
    assert vector.sites == (Site("resid", 2),)
    assert_mean(vector, [1, 2])
    (near,) = vectors(library(documents, layers=[0, 2, 2, 1], top=1), "red")
    assert near is not None
    assert near.sites == (Site("resid", 0),)


def test_vectors_of_any_sites_may_stand_in_a_library() -> None:
    twice = entry(0, "red sea").then(entry(1, "x", 2))
    assert twice.origin is not None
    twice = replace(twice, origin=twice.origin.model_copy(update={"demos": (Example("red", "sea"),)}))
    source = ElicitLibrary((twice, entry(2, "walk")), origin(), 0.0)
    assert source.sites == (Site("resid", 1), Site("resid", 2))
    (vector,) = vectors(source, "red")
    assert vector is not None
    assert vector.sites == (Site("resid", 1), Site("resid", 2))


def test_a_library_is_a_vector_source() -> None:
    source = library(["red blue"])
    assert isinstance(source, VectorSource)
    assert source.origin == origin()


# --- injection --------------------------------------------------------------------------------------------------------


def mixed() -> tuple[ElicitLibrary, list[str], list[Tensor | None]]:
    """A library, queries of which one retrieves nothing, and what is added for each."""
    source = library(["red sea", "red", "walk talk", "other"])
    shifts = [theta(0) + theta(1), None, 2 * theta(2)]  # 2 x the mean of two; nothing; 2 x one
    return source, ["red", "film 3", "walk"], shifts


def test_injecting_a_library_moves_each_row_by_its_own_mean_times_two() -> None:
    lm = exact_lm("llama")
    source, queries, shifts = mixed()
    format = PromptFormat.named("arrow")
    batch = lm.batch([lm.encode(format.prompt(query)) for query in queries])
    with torch.no_grad(), inject(lm, source):
        got = lm.forward(batch)[torch.arange(3), batch.last]
    expected = torch.stack([moved(query, shift) for query, shift in zip(queries, shifts, strict=True)])
    assert (expected[0] - moved("red", None)).abs().max() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_generation_edits_the_last_prompt_token_of_each_row_once() -> None:
    lm = exact_lm("llama")
    source, queries, shifts = mixed()
    expected = []
    for query, shift in zip(queries, shifts, strict=True):
        tokens = ids(prompt(query))
        change = {} if shift is None else {1: plus(len(tokens) - 1, shift.double())}
        with torch.no_grad():
            for _ in range(6):
                tokens.append(int(run(lm.model, tokens, change).logits[-1].argmax()))
        expected.append(lm.decode(lm.before_end(tokens[-6:])))
    format = PromptFormat.named("arrow")
    prompts = [format.prompt(query) for query in queries]
    with inject(lm, source):
        assert lm.generate(prompts, max_new_tokens=6) == expected
    assert lm.generate(prompts, max_new_tokens=6) != expected


def test_observing_and_scoring_a_library() -> None:
    lm, task = exact_lm("llama"), open_task()
    inputs = [example.input for example in task.dev.examples]
    source = library([inputs[0], inputs[1], "nothing of it"])
    expected = [moved(inputs[0], 2 * theta(0)), moved(inputs[1], 2 * theta(1)), *(moved(i, None) for i in inputs[2:])]
    # inputs such as "film 3" share the word "film" with others: these queries are kept apart
    alone = [i for i, text in enumerate(inputs) if i < 2 or not set(text.split()) & set(" ".join(inputs[:2]).split())]
    got = observe(lm, task.dev, source).logits
    torch.testing.assert_close(got[alone], torch.stack(expected)[alone].float(), atol=1e-4, rtol=0)
    row = score(lm, task.dev, source).rows[0]
    assert row.n == len(task.dev)
    assert row.d_ntp_full is not None


# --- fit --------------------------------------------------------------------------------------------------------------


@cache
def fit_labels(seed: int = 0) -> ElicitLibrary:
    task = label_task()
    return SMALL.fit(exact_lm("llama"), task.train, task.dev, seed=seed)


@pytest.mark.parametrize("seed", [0, 3])
def test_entries_are_few_shot_states_at_the_layer_best_on_dev(seed: int) -> None:
    lm, task = exact_lm("llama"), label_task()
    drawn = draw(task.train, 3, seed=seed)
    with torch.no_grad():
        runs = [run(lm.model, ids(prompt(one.query.input, one.demos))) for one in drawn]
    states = [torch.stack([r.resid[layer][-1] for r in runs]) for layer in range(lm.n_layers)]

    def changed(layer: int, tokens: list[int], at: int) -> Tensor:
        return run(lm.model, tokens, {layer: plus(at, 2 * states[layer].mean(0))}).logits

    found = best_of(lm.model, task.dev, 6, changed, lm.n_layers)
    best = max(range(lm.n_layers), key=lambda layer: found[layer])
    made = fit_labels(seed)
    assert len(made.entries) == 3
    assert len({one.demos for one in drawn}) == 3  # demonstrations of its own
    for state, one, vector in zip(states[best], drawn, made.entries, strict=True):
        (edit,) = vector.edits
        assert (edit.site, edit.where, edit.strength) == (Site("resid", best), Where(), 2.0)
        torch.testing.assert_close(edit.op.tensors()["vector"].double(), state, atol=1e-5, rtol=1e-5)
        assert vector.origin is not None
        assert vector.origin.demos == one.demos
        assert one.query not in one.demos
    assert made.origin.found["layers"] == {task.name: best}
    assert made.origin.found["entries"] == 3


def wordy_task(name: str, word: str, *, n_dev_alike: int, format: str = "arrow") -> Task:
    """Inputs that share a word with all demonstrations; of dev's only some do, each with as many more words as its
    number, so that their scores differ."""
    stems = [f"{word} {word[0]}{i}" for i in range(50)]
    spec = Task.from_examples(
        replace(open_task().spec, name=name, format=PromptFormat.named(format)),
        [Example(stem, stem.split()[1]) for stem in stems],
        n_test=10,
    )
    dev = [
        Example(" ".join([word] * (i + 1)) if i < n_dev_alike else f"lone{i}", "x")
        for i in range(len(spec.dev.examples))
    ]
    return replace(spec, dev=Dev(spec.spec, tuple(dev)))


@pytest.mark.parametrize("recall", [0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("n_dev", [5, 10])
def test_the_threshold_is_the_score_that_the_recall_of_dev_queries_reaches(recall: float, n_dev: int) -> None:
    """The highest of the scores that at least that share reaches, each query's score being its best among the entries
    of its own task. (Less a ten-thousandth, so that the query that set it passes.)"""
    lm, task = exact_lm("llama"), wordy_task("wordy", "red", n_dev_alike=10)
    made = replace(SMALL, recall=recall, n_dev=n_dev).fit(lm, task.train, task.dev)
    documents = ["\n".join(f"{d.input} {d.output}" for d in e.origin.demos) for e in made.entries if e.origin]
    reached = sorted((max(bm25(example.input, documents)) for example in task.dev.examples[:n_dev]), reverse=True)
    assert len(set(reached)) == n_dev
    needed = math.ceil(recall * n_dev - 1e-9)
    assert made.threshold == pytest.approx(reached[needed - 1], rel=1e-3)
    assert made.origin.found["threshold"] == made.threshold
    passed = [vector is not None for vector in vectors(made, *(e.input for e in task.dev.examples[:n_dev]))]
    assert sum(passed) >= needed


def test_a_query_without_a_shared_word_gets_nothing_after_a_fit() -> None:
    lm, task = exact_lm("llama"), wordy_task("wordy", "red", n_dev_alike=5)
    made = replace(SMALL, n_dev=10).fit(lm, task.train, task.dev)  # half of dev reaches no entry: below the recall
    got = vectors(made, "lone7", "red", "walk")
    assert [vector is None for vector in got] == [True, False, True]


def test_a_fit_takes_many_tasks_and_retrieves_the_querys_own() -> None:
    lm = exact_lm("llama")
    one, two = (wordy_task(name, name, n_dev_alike=10) for name in ("red", "walk"))
    made = SMALL.fit(lm, [one.train, two.train], [one.dev, two.dev])
    owners = [vector.origin.task for vector in made.entries if vector.origin is not None]
    assert owners == ["red"] * 3 + ["walk"] * 3
    hashes = {vector.origin.data_hash for vector in made.entries if vector.origin is not None}
    assert hashes == {one.spec.data_hash, two.spec.data_hash}
    scores = made.scores(lm, ["red red", "walk walk"])
    assert (scores[0, :3] > 0).all()
    assert (scores[0, 3:] == 0).all()
    for query, vector in zip(("red", "walk"), vectors(made, "red red", "walk walk"), strict=True):
        assert vector is not None
        assert vector.origin is not None
        assert vector.origin.task == query
    assert set(made.origin.found["layers"]) == {"red", "walk"}  # type: ignore[arg-type]


def test_built_in_tasks_stand_beside_the_one_given() -> None:
    lm, task = exact_lm("llama"), open_task()
    made = replace(SMALL, others=("capitalize",), prompts=2, n_dev=2).fit(lm, task.train, task.dev)
    owners = [vector.origin.task for vector in made.entries if vector.origin is not None]
    assert owners == ["tiny"] * 2 + ["capitalize"] * 2
    formats = {vector.origin.format.hash for vector in made.entries if vector.origin is not None}
    assert formats == {task.spec.format.hash}
    assert {len(vector.origin.demos) for vector in made.entries if vector.origin is not None} == {3}


def test_tasks_of_different_formats_are_refused() -> None:
    one, two = wordy_task("red", "red", n_dev_alike=10), wordy_task("walk", "walk", n_dev_alike=10, format="qa")
    with pytest.raises(InputError, match="tasks of one format"):
        SMALL.fit(exact_lm("llama"), [one.train, two.train], [one.dev, two.dev])


def test_a_train_split_without_its_dev_split_is_refused() -> None:
    task = open_task()
    for trains, devs in (([task.train] * 2, [task.dev]), ([], [])):
        with pytest.raises(InputError, match="a dev split for every train split"):
            SMALL.fit(exact_lm("llama"), trains, devs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": "0"}, r"elicit\.prompts of at least 1"),
        ({"top": "0"}, r"elicit\.top of at least 1"),
        ({"n_dev": "0"}, r"elicit\.n_dev of at least 1"),
        ({"recall": "0"}, r"a recall above 0 and at most 1"),
        ({"recall": "1.5"}, r"a recall above 0 and at most 1"),
        ({"recall": "nan"}, r"a recall above 0 and at most 1"),
    ],
)
def test_hyperparameters_that_mean_nothing_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.make("elicit", settings).fit(exact_lm("llama"), open_task().train, open_task().dev)


# --- dense ------------------------------------------------------------------------------------------------------------


def test_dense_compares_directions_of_centred_states_in_the_middle() -> None:
    lm, documents = exact_lm("llama"), ["red blue", "walk talk", "good film"]
    queries = ["blue", "talk walk", "bad film"]
    with torch.no_grad():
        rows, asked = (
            torch.stack([run(lm.model, ids(text)).resid[lm.n_layers // 2][-1] for text in some])
            for some in (documents, queries)
        )
    centre = rows.mean(0)
    expected = torch.nn.functional.cosine_similarity((asked - centre)[:, None], (rows - centre)[None], dim=-1)
    got = library(documents, retriever="dense").scores(lm, queries)
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=0)


def test_dense_retrieval_takes_the_nearest_above_zero() -> None:
    lm, documents = exact_lm("llama"), ["red blue", "walk talk", "good film"]
    source = library(documents, retriever="dense", top=1)
    best = source.scores(lm, ["walk talk"])[0]
    assert int(best.argmax()) == 1
    assert float(best[1]) == pytest.approx(1.0, abs=1e-5)
    assert_mean(vectors(source, "walk talk")[0], [1])
    assert vectors(replace(source, threshold=1.1), "walk talk") == [None]


def test_a_dense_library_is_fitted_saved_and_injected(tmp_path: Path) -> None:
    lm, task = exact_lm("llama"), open_task()
    made = replace(SMALL, retriever="dense").fit(lm, task.train, task.dev)
    made.save_pretrained(tmp_path / "v")
    loaded = ElicitLibrary.from_pretrained(tmp_path / "v")
    assert loaded.retriever == "dense"
    assert torch.equal(observe(lm, task.dev, loaded).logits, observe(lm, task.dev, made).logits)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A random BERT and a tokenizer of whole words, in a folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["red", "blue", "walk", "talk", "good", "film"]]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    folder = tmp_path / "encoder"
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **size)).save_pretrained(folder)
    return folder


def test_a_sentence_encoder_is_mean_pooled_over_each_text_alone(encoder: Path) -> None:
    documents, queries = ["red blue", "walk talk good film", "film"], ["blue", "talk walk", "good red walk"]
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizerFast.from_pretrained(encoder)
    with torch.no_grad():
        rows, asked = (
            torch.stack(
                [model(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0].mean(0) for text in some]
            )
            for some in (documents, queries)
        )
    centre = rows.mean(0)
    expected = torch.nn.functional.cosine_similarity((asked - centre)[:, None], (rows - centre)[None], dim=-1)
    got = library(documents, retriever="dense", encoder=str(encoder)).scores(exact_lm("llama"), queries)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_library_keeps_the_name_of_its_encoder(encoder: Path, tmp_path: Path) -> None:
    lm, task = exact_lm("llama"), open_task()
    made = replace(SMALL, retriever="dense", encoder=str(encoder)).fit(lm, task.train, task.dev)
    made.save_pretrained(tmp_path / "v")
    loaded = ElicitLibrary.from_pretrained(tmp_path / "v")
    assert loaded.encoder == str(encoder)
    assert torch.equal(observe(lm, task.dev, loaded).logits, observe(lm, task.dev, made).logits)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"retriever": "dense", "encoder": "/no/such/folder"}, "a sentence encoder that transformers can load"),
        ({"encoder": "/no/such/folder"}, "elicit.retriever = dense with an encoder"),
    ],
)
def test_an_encoder_that_cannot_serve_is_refused_before_anything_runs(fields: dict[str, Any], said: str) -> None:
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(InputError, match=said), lm.metered() as meter:
        replace(SMALL, **fields).fit(lm, task.train, task.dev)
    assert meter.passes == 0


# --- the package ------------------------------------------------------------------------------------------------------


def test_without_bm25s_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(MissingPackage, match="run: pip install bm25s") as caught:
        vectors(library(["red blue"]), "red")
    assert "\n" not in str(caught.value)
    task = open_task()
    with pytest.raises(MissingPackage, match="pip install bm25s"):
        SMALL.fit(exact_lm("llama"), task.train, task.dev)


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    library(["red sea", "walk talk"], 0.25, layers=[0, 2], top=7).save_pretrained(tmp_path / "library")
    return tmp_path / "library"


def test_saving_and_loading_is_exact(tmp_path: Path) -> None:
    made = fit_labels()
    made.save_pretrained(tmp_path / "v")
    loaded = methods.load(tmp_path / "v")
    assert isinstance(loaded, ElicitLibrary)
    assert loaded.source == str(tmp_path / "v")
    for name in ("threshold", "top", "retriever", "encoder", "origin", "sites"):
        assert getattr(loaded, name) == getattr(made, name)
    for one, two in zip(loaded.entries, made.entries, strict=True):
        assert one.origin == two.origin
        assert [(e.site, e.where, e.strength) for e in one.edits] == [(e.site, e.where, e.strength) for e in two.edits]
        assert all(torch.equal(a, b) for a, b in zip(one.tensors().values(), two.tensors().values(), strict=True))
    lm: LM = exact_lm("llama")
    dev = label_task().dev
    assert torch.equal(observe(lm, dev, loaded).logits, observe(lm, dev, made).logits)


def test_an_entry_is_an_ordinary_vector_folder(folder: Path) -> None:
    vector = TaskVector.from_pretrained(folder / "0001")
    assert torch.equal(vector.tensors()["0.vector"], theta(1))
    assert vector.origin is not None
    assert vector.origin.demos == (Example("walk", "talk"),)


def test_an_existing_folder_is_only_overwritten_on_request(folder: Path) -> None:
    with pytest.raises(InputError, match="overwrite"):
        library(["red"]).save_pretrained(folder)
    library(["red"], 0.75).save_pretrained(folder, overwrite=True)
    loaded = ElicitLibrary.from_pretrained(folder)
    assert (len(loaded.entries), loaded.threshold) == (1, 0.75)
    assert [path.name for path in folder.parent.iterdir()] == ["library"]


def test_no_library_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=MARK):
        ElicitLibrary.from_pretrained(tmp_path)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file that lists the library, changed."""
    plain = json.loads((folder / MARK).read_text("utf-8"))
    change(plain)
    (folder / MARK).write_text(json.dumps(plain, indent=2), "utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.update(threshold=0.5),
        lambda plain: plain.update(top=8),
        lambda plain: plain.update(retriever="dense"),
        lambda plain: plain.update(encoder="other"),
        lambda plain: plain.update(checksum="0" * 64),
        lambda plain: plain.update(checksum=""),
        lambda plain: plain.update(format_version=2),
        lambda plain: plain.update(unheard_of=1),
        lambda plain: plain["entries"].pop("0001"),
        lambda plain: plain["entries"].update({"0001": "0" * 64}),
        lambda plain: plain["origin"].update(seed=9),
        lambda plain: plain.pop("origin"),
    ],
)
def test_an_edited_list_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edited(folder, change)
    with pytest.raises(VectorCorrupt):
        ElicitLibrary.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[]", b"\xff\xfe", b"{"])
def test_a_list_of_another_kind_is_refused(folder: Path, content: bytes) -> None:
    (folder / MARK).write_bytes(content)
    with pytest.raises(VectorCorrupt):
        ElicitLibrary.from_pretrained(folder)


PARTS = ("task_vector.safetensors", "task_vector_config.json", "README.md")
FILES = [f"{name}/{part}" for name in ("0000", "0001") for part in PARTS]


def change_a_byte(path: Path, data: st.DataObject, root: Path) -> None:
    """Any byte of a file to any other value: the library is refused, and then put right again."""
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b' \n\r\t01e."{}'))))
    bad = bytearray(good)
    bad[at] = new if new != good[at] else new ^ 1
    path.write_bytes(bytes(bad))
    try:
        with pytest.raises(VectorCorrupt):
            ElicitLibrary.from_pretrained(root)
    finally:
        path.write_bytes(good)


fuzzed = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
@fuzzed
def test_every_changed_byte_of_an_entry_is_refused(folder: Path, name: str, data: st.DataObject) -> None:
    change_a_byte(folder / name, data, folder)


@given(data=st.data())
@fuzzed
def test_every_changed_byte_of_the_list_is_refused(folder: Path, data: st.DataObject) -> None:
    change_a_byte(folder / MARK, data, folder)


def test_white_space_in_the_list_counts(folder: Path) -> None:
    good = (folder / MARK).read_bytes()
    for bad in (good.replace(b"\n", b" "), good + b"\n", b" " + good):
        (folder / MARK).write_bytes(bad)
        with pytest.raises(VectorCorrupt):
            ElicitLibrary.from_pretrained(folder)


def test_a_changed_card_is_refused(folder: Path) -> None:
    """As in a vector folder."""
    (folder / "README.md").write_text("another card", "utf-8")
    with pytest.raises(VectorCorrupt, match=r"README\.md"):
        ElicitLibrary.from_pretrained(folder)


@pytest.mark.parametrize("name", ["0000", "0001"])
def test_a_missing_entry_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    with pytest.raises(VectorCorrupt, match=f"{name} is missing"):
        ElicitLibrary.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_of_an_entry_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(VectorCorrupt):
        ElicitLibrary.from_pretrained(folder)


def test_an_extra_entry_is_named(folder: Path) -> None:
    shutil.copytree(folder / "0001", folder / "0002")
    with pytest.raises(VectorCorrupt, match="0002 is unknown"):
        ElicitLibrary.from_pretrained(folder)


def test_an_extra_file_beside_the_entries_is_refused(folder: Path) -> None:
    """As in a vector folder: anything added."""
    (folder / "model.bin").write_bytes(b"x")
    with pytest.raises(VectorCorrupt, match=r"model\.bin"):
        ElicitLibrary.from_pretrained(folder)


def test_entries_exchanged_are_refused(folder: Path) -> None:
    (folder / "0000").rename(folder / "kept")
    (folder / "0001").rename(folder / "0000")
    (folder / "kept").rename(folder / "0001")
    with pytest.raises(VectorCorrupt, match="0000"):
        ElicitLibrary.from_pretrained(folder)


def test_another_good_vector_in_an_entrys_place_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "0001")
    entry(9, "walk talk", 2).save_pretrained(folder / "0001")
    with pytest.raises(VectorCorrupt, match="0001 is not the one that was saved"):
        ElicitLibrary.from_pretrained(folder)


def test_a_query_is_its_own_characters_whatever_its_tokens_hold() -> None:
    lm = exact_lm("llama")
    for template in ("{input} ->{output}\n", "({input}) ={output}\n", "{input}?{output}\n"):
        format = PromptFormat.named(template)
        encoded = lm.encode(format.prompt("red blue", (Example("walk", "talk"),)))
        assert import_module("taskvec.methods.elicit").query_text(encoded) == "red blue"
    assert import_module("taskvec.methods.elicit").query_text(lm.encode("walk talk")) == "walk talk"


def test_entries_and_library_know_their_own_tasks_answers_and_data() -> None:
    lm = exact_lm("llama")
    short, long = tiny.tiny_task(shots=3), tiny.tiny_task(shots=3, n_test=6)
    spec = replace(long.spec, name="long", data_hash="another", outputs=("red " * 9 + "blue",))
    train, dev = replace(long.train, spec=spec), replace(long.dev, spec=spec)
    made = replace(SMALL, retriever="dense").fit(lm, [short.train, train], [short.dev, dev])
    limits = {o.task: o.max_new_tokens for o in (entry.origin for entry in made.entries) if o is not None}
    assert limits["long"] > limits[short.name] > 0
    assert made.origin.max_new_tokens == limits["long"]
    assert made.origin.kept_away == {short.spec.data_hash: short.spec.n_test, "another": 6}


def test_without_bm25s_nothing_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(MissingPackage), lm.metered() as meter:
        SMALL.fit(lm, task.train, task.dev)
    assert meter.passes == 0
