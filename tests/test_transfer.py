"""Transfer against the Linear TV paper's scenarios: plain states, plain ridge, one identity a way."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec import transfer as module
from taskvec.errors import InputError, UnknownName
from taskvec.evaluate.observe import first_tokens
from taskvec.evaluate.shared import states_of
from taskvec.lm import LM
from taskvec.methods.linear import LinearTaskVector
from taskvec.prompts import Example
from taskvec.tasks import Task
from taskvec.transfer import WAYS, TransferTaskVector, alignment, shared_rows, token_strings, transfer
from taskvec.vector import Affine, TaskVector
from tests import tiny
from tests.reference import answer, exact_lm, head_states, label_task, open_task, pairs

QUERIES, RIDGE = 12, 0.5
WIDE, NARROW = "gemma3", "llama"  # 40 and 32 numbers, one tokenizer


# --- the reference ----------------------------------------------------------------------------------------------------


def states(lm: LM, queries: Sequence[Example], demos: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(zero-shot, few-shot) states before the head, by transformers' own output of hidden states."""
    zero, few = pairs(lm.model, queries, demos)
    return head_states(zero), head_states(few)


def ridge(features: Tensor, differences: Tensor, strength: float = RIDGE) -> Tensor:
    """W with W h the prediction, in the primal form: Y'H (H'H + lam I)^-1."""
    gram = features.T @ features + strength * torch.eye(features.shape[1], dtype=torch.float64)
    inverse: Tensor = torch.linalg.inv(gram)
    return differences.T @ features @ inverse


def unembedding(lm: LM) -> Tensor:
    weight: Tensor = lm.model.get_output_embeddings().weight.detach()
    return weight.double()


def aligning() -> Tensor:
    """M over the tokenizer's tokens: both matrices have rows that no token has."""
    small, large = (unembedding(exact_lm(name))[: len(tiny.tokenizer())] for name in (NARROW, WIDE))
    back: Tensor = torch.linalg.pinv(small)
    return back @ large


@cache
def known(source: str, target: str, labels: bool) -> dict[str, Tensor]:
    """All states that a way may use."""
    task = label_task() if labels else open_task()
    demos = task.train.demonstrations(seed=0)
    queries = task.train.queries(demos, QUERIES, seed=0)
    zero_s, _ = states(exact_lm(target), queries, demos)
    zero_l, icl_l = states(exact_lm(source), queries, demos)
    return {"zero_s": zero_s, "zero_l": zero_l, "icl_l": icl_l}


def fitted(way: str, source: str, target: str, *, labels: bool = False, strength: float = RIDGE) -> TaskVector:
    task = label_task() if labels else open_task()
    method = TransferTaskVector(way, strength, QUERIES)
    return method.fit(exact_lm(source), exact_lm(target), task.train)


def matrix(vector: TaskVector) -> Tensor:
    (edit,) = vector.edits
    assert isinstance(edit.op, Affine)
    assert str(edit.site) == "lm_head_in"
    return edit.op.write.double().T @ edit.op.read.double()


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


# --- the ways ---------------------------------------------------------------------------------------------------------


def test_direct_maps_the_targets_states_to_the_sources_few_shot_states() -> None:
    s = known("qwen3", NARROW, False)
    close(matrix(fitted("direct", "qwen3", NARROW)), ridge(s["zero_s"], s["icl_l"] - s["zero_s"]))


def test_difference_is_the_sources_own_map() -> None:
    s = known("qwen3", NARROW, False)
    close(matrix(fitted("difference", "qwen3", NARROW)), ridge(s["zero_l"], s["icl_l"] - s["zero_l"]))


def test_conjugated_goes_there_and_back_through_the_alignment() -> None:
    s = known(WIDE, NARROW, False)
    m = aligning()
    own = ridge(s["zero_l"], s["icl_l"] - s["zero_l"])
    close(matrix(fitted("conjugated", WIDE, NARROW)), m @ own @ torch.linalg.pinv(m))


def test_aligned_maps_to_the_few_shot_states_seen_through_the_alignment() -> None:
    s = known(WIDE, NARROW, False)
    m = aligning()
    close(matrix(fitted("aligned", WIDE, NARROW)), ridge(s["zero_s"], s["icl_l"] @ m.T - s["zero_s"]))


def test_aligned_is_a_ridge_on_label_logits_as_far_as_labels_see() -> None:
    """Numerical test 12 of the paper's page: U_C W = ridge onto U_C M h_icl(L) - U_C h_zs(S)."""
    s = known(WIDE, NARROW, True)
    lm = exact_lm(NARROW)
    m = aligning()
    ids = [answer("red0", label)[0][-1] for label in ("good", "bad")]
    rows = unembedding(lm)[ids]
    expected = ridge(s["zero_s"], s["icl_l"] @ m.T @ rows.T - s["zero_s"] @ rows.T)
    close(rows @ matrix(fitted("aligned", WIDE, NARROW, labels=True)), expected)


def test_label_logits_gives_the_sources_label_distribution_where_the_ridge_vanishes() -> None:
    s = known(WIDE, NARROW, True)
    task, small, large = label_task(), exact_lm(NARROW), exact_lm(WIDE)
    ids = [tokens[0] for tokens in first_tokens(small, task.train)]
    assert len(set(ids)) == len(ids) == 3
    after = s["zero_s"] + s["zero_s"] @ matrix(fitted("label-logits", WIDE, NARROW, labels=True, strength=1e-9)).T
    ours, theirs = after @ unembedding(small)[ids].T, s["icl_l"] @ unembedding(large)[ids].T
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("way", ["direct", "difference", "conjugated", "aligned", "tokens"])
def test_from_a_model_to_itself_every_way_is_its_own_linear_vector(way: str) -> None:
    lm, task = exact_lm("qwen3"), open_task()
    own = LinearTaskVector(ridge=RIDGE, queries=QUERIES).fit(lm, task.train, task.dev)
    h = known("qwen3", "qwen3", False)["zero_s"]
    close(h @ matrix(fitted(way, "qwen3", "qwen3")).T, h @ matrix(own).T, 1e-3)


def test_an_alignment_undoes_a_change_of_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    change = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(alignment(rows, rows @ change), change)


class _Words:
    """A tokenizer of whole strings, which drops a text's first blank, as sentencepiece's do."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.words.index(text)]}

    def batch_decode(self, rows: list[list[int]], *, clean_up_tokenization_spaces: bool) -> list[str]:
        assert not clean_up_tokenization_spaces
        return ["".join(self.words[i] for i in row).removeprefix(" ") for row in rows]


def test_shared_rows_are_those_of_equal_strings_whatever_their_numbers() -> None:
    small, large = tiny.fresh_lm(NARROW), tiny.fresh_lm(WIDE)
    small.tokenizer = _Words(["a", "b", "", "c\ufffd", "d", "a", " d"])
    large.tokenizer = _Words(["d", " d", "x", "c\ufffd", "a", ""])
    assert token_strings(small) == {"a": 0, "b": 1, "d": 4, " d": 6}
    ours, theirs = shared_rows(large, small)
    assert torch.equal(ours, unembedding(small)[[0, 4, 6]])
    assert torch.equal(theirs, unembedding(large)[[4, 0, 1]])


def test_no_test_answer_reaches_the_label_logits_of_an_open_task() -> None:
    task = open_task()
    outputs = {example.output for example in task.train.examples}
    assert set(module._of_train(task.train).spec.outputs) == outputs < set(task.train.spec.outputs)
    assert module._of_train(label_task().train).spec.outputs == label_task().spec.labels


@pytest.mark.parametrize(
    "fields", [{"queries": 0}, {"queries": -5}, {"ridge": -5.0}, {"ridge": float("nan")}, {"ridge": float("inf")}]
)
def test_settings_that_mean_nothing_are_refused_before_any_pass(fields: Any) -> None:
    with exact_lm(WIDE).metered() as meter, pytest.raises(InputError, match=r"of at least 1|a finite ridge above 0"):
        transfer(exact_lm(WIDE), exact_lm(NARROW), open_task(), **fields)
    with pytest.raises(UnknownName, match="did you mean tokens"):
        transfer(exact_lm(WIDE), exact_lm(NARROW), open_task(), ["tokns"])
    assert meter.tokens == 0


def test_every_way_is_billed_for_the_seconds_of_the_states_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed for another way, and came from memory here, took 1000 s."""
    ways = ("aligned", "tokens")

    def remembered(*args: Any) -> Any:
        return states_of(*args)[0], 1000.0

    monkeypatch.setattr(module, "states_of", remembered)
    done = transfer(exact_lm(WIDE), exact_lm(NARROW), open_task(), ways, queries=QUERIES)
    rows = [done.results[f"transfer-{way}"] for way in ways]
    assert rows[0].fit_tokens == rows[1].fit_tokens
    assert all(1000 <= row.fit_seconds < 2000 for row in rows)  # the few-shot states alone are the source's


# --- what is refused, and what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "error", "said"),
    [
        ("direct", InputError, "models of one width"),
        ("difference", InputError, "40 in exact-gemma3 and 32 in exact-llama"),
        ("token", UnknownName, "did you mean tokens"),
    ],
)
def test_a_way_that_the_models_do_not_allow_is_refused_before_any_pass(way: str, error: type, said: str) -> None:
    with exact_lm(WIDE).metered() as theirs, exact_lm(NARROW).metered() as ours, pytest.raises(error, match=said):
        fitted(way, WIDE, NARROW)
    assert (theirs.passes, ours.passes) == (0, 0)


@pytest.mark.parametrize("way", ["conjugated", "aligned"])
def test_two_tokenizers_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_lm(WIDE), "tokenizer_hash", "another", raising=False)
    with pytest.raises(InputError, match="one tokenizer"):
        fitted(way, WIDE, NARROW)


def test_too_few_strings_in_common_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "token_strings", lambda lm: {"a": 0})
    with pytest.raises(InputError, match="at least 64 token strings in common"):
        fitted("tokens", WIDE, NARROW)


def test_the_origin_names_both_models_and_counts_both_ones_tokens() -> None:
    source, target, task = exact_lm(WIDE), exact_lm(NARROW), open_task()
    fitted("tokens", WIDE, NARROW)  # what is proved once per model is no part of a fit's cost
    with source.metered() as theirs, target.metered() as ours:
        vector = TransferTaskVector("tokens", queries=QUERIES).fit(source, target, task.train)
    origin = vector.origin
    assert origin is not None
    assert (origin.method, origin.model.id) == ("transfer-tokens", target.id)
    assert origin.hyperparameters["source"] == source.id
    assert origin.cost.tokens == theirs.tokens + ours.tokens > theirs.tokens > 0
    assert (origin.cost.labels, origin.cost.queries) == (3, QUERIES)


@pytest.mark.parametrize("labels", [False, True])
def test_the_table_has_the_targets_own_rows_the_ways_and_the_controls(labels: bool) -> None:
    task: Task = label_task() if labels else open_task()
    done = transfer(exact_lm(WIDE), exact_lm(NARROW), task, queries=QUERIES)
    names = [row.method for row in done.results.rows]
    left_out = {"direct", "difference", *(() if labels else ("label-logits",))}  # one first token for all outputs there
    ways = [f"transfer-{way}" for way in WAYS if way not in left_out]
    assert names == ["zero-shot", "few-shot", "linear", *ways, "random"]
    assert set(done.left_out) == left_out
    assert [row.method for row in done.source.rows] == ["zero-shot", "few-shot", "linear"]
    few = done.results["few-shot"]
    assert few.d_ntp_full is not None
    assert few.d_ntp_full.value == 0.0  # the target's own few-shot is the reference
    assert done.results["random"].matched in ways


def test_a_vector_is_saved_and_read_like_any_other(tmp_path: Any) -> None:
    vector = fitted("tokens", WIDE, NARROW)
    vector.save_pretrained(tmp_path / "v")
    loaded = TaskVector.from_pretrained(tmp_path / "v")
    assert torch.equal(matrix(loaded), matrix(vector))


def test_the_command_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from taskvec.cli import transfer as command
    from taskvec.cli.work import ModelOptions, PromptOptions

    prompts = PromptOptions(None, "", 4, 12)
    options = command.TransferOptions(["direct", "tokens"], (0, 1), {"ridge": 1.0, "queries": 8})
    models = ModelOptions("tiny", None, None), ModelOptions("tiny", None, None)
    command.transfer_task("tiny_spell", prompts, models, options, as_json=True)
    plain = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["seed"]) for row in plain["rows"]] == [
        (method, seed)
        for seed in (0, 1)
        for method in ("zero-shot", "few-shot", "linear", "transfer-direct", "transfer-tokens", "random")
    ]
    assert plain["left_out"] == {}
    command.transfer_task("tiny_spell", prompts, models, replace(options, ways=["tokens"], seeds=(0,)), as_json=False)
    assert "transfer-tokens" in capsys.readouterr().out
