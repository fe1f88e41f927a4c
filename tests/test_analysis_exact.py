"""Analyses where the answer is known: a purely linear network, formulas written out, random matrices."""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from taskvec.analysis import ANALYSES, Beside, Subject
from taskvec.analysis.attention import attention
from taskvec.analysis.conflict import common, conflict, disputed, rival
from taskvec.analysis.finding import Finding, jackknifed, value
from taskvec.analysis.geometry import clustered, cosines, effective_rank, geometry, nearest, paired
from taskvec.analysis.heads import DOSES, NULL, ablated, heads, matched, ranking, salience
from taskvec.analysis.ov import VECTOR, Path, _edits, norm_scale, ov, values
from taskvec.analysis.propagation import (
    CONSTANT,
    alike,
    explained,
    fits,
    fitted_map,
    grouped,
    jacobians,
    propagation,
    shifts,
)
from taskvec.analysis.propagation import drawn as draws
from taskvec.analysis.rotation import polar, rotation
from taskvec.analysis.subject import likeliest
from taskvec.errors import InputError, ModelError
from taskvec.hooks import capture, inject
from taskvec.lm import LM
from taskvec.replay import Ask, Trial
from taskvec.results import Metric
from taskvec.sites import Site
from taskvec.tasks import load_task
from taskvec.vector import Add, Edit, TaskVector
from tests import tiny
from tests.linear_net import linear_lm, matrices, product
from tests.reference import blocks, both_families, exact_lm, run, telling_task

ROW = tiny.random_vector(32, 4)
ov_module = sys.modules["taskvec.analysis.ov"]
"""The package's `ov` is the function."""


def subject_of(lm: LM, layer: int = 0, row: Tensor = ROW, n: int = 6) -> Subject:
    return Subject.of(lm, TaskVector((Edit(Site("resid", layer), Add(row)),)), telling_task(), n=n, seed=1)


@cache
def linear() -> Subject:
    return subject_of(linear_lm())


def mean_map(subject: Subject, layer: int) -> Tensor:
    maps = [product(matrices(subject.lm, len(prompt))[layer + 1 :]) for prompt in subject.bare]
    return torch.stack(maps).mean(0).float()


# --- the linear network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_mean_jacobian_is_the_product_of_the_blocks(layer: int) -> None:
    torch.testing.assert_close(jacobians(linear())[layer], mean_map(linear(), layer), atol=1e-5, rtol=1e-4)


def test_a_group_of_prompts_can_be_left_out_of_the_mean_jacobian() -> None:
    one = linear()
    groups = grouped(one)
    assert sorted(i for group in groups for i in group) == list(range(len(one.bare)))
    for left, group in enumerate(groups):
        kept = [prompt for i, prompt in enumerate(one.bare) if i not in group]
        maps = [product(matrices(one.lm, len(prompt))[1:]) for prompt in kept]
        expected = torch.stack(maps).mean(0).float()
        torch.testing.assert_close(jacobians(one, without=left)[0], expected, atol=1e-5, rtol=1e-4)


def test_shifts_are_the_map_of_the_vector() -> None:
    rows = torch.stack([ROW, 3 * ROW, tiny.random_vector(32, 5)])
    found = shifts(linear(), 0, rows)
    for i, prompt in enumerate(linear().bare):
        one = product(matrices(linear().lm, len(prompt))[1:]).float()
        torch.testing.assert_close(found[:, i], rows @ one.T, atol=1e-4, rtol=1e-4)


def test_a_fit_finds_the_map() -> None:
    same = [prompt for prompt in linear().bare if len(prompt) == len(linear().bare[0])]
    one = subject_of(linear().lm)
    vars(one)["bare"], vars(one)["golds"] = same, one.golds[: len(same)]
    made = draws(one, 160, lambda noise: ROW + noise, seed=0)
    expected = product(matrices(one.lm, len(same[0]))[1:]).float()
    torch.testing.assert_close(fitted_map(made.rows, made.moved), expected, atol=1e-4, rtol=1e-4)


def test_everything_is_explained_and_nothing_departs_from_linearity() -> None:
    found = propagation(linear()).found
    for layer in range(3):
        for by in ("J, the vector", "J, random vectors", "J, sums"):
            assert value(found, measure="R2", by=by, layer=layer).value == pytest.approx(1, abs=1e-4)
        assert value(found, measure="R2", by=CONSTANT, layer=layer).value < 0.7
        for of in ("additivity", "homogeneity"):
            assert value(found, measure="error", of=of, layer=layer).value < 1e-4
    assert value(found, measure="alike", of="the vector", layer=2).value == pytest.approx(1, abs=1e-6)
    for strength in (0.05, 2.0):
        assert value(found, measure="reach", of="the vector", strength=strength).value == pytest.approx(1, abs=1e-4)
    images = [value(found, measure="accuracy", of=of).value for of in ("the vector", "J v at the last layer")]
    assert images[0] == pytest.approx(images[1], abs=0.2)  # the mean map serves prompts of all lengths


def test_what_heads_read_off_a_vector_is_what_they_gain() -> None:
    path = Path(linear(), ROW)
    gains = path.gains()
    site = Site("heads", 1)
    with_it, without = (linear().states(linear().bare, vector, [site])[site] for vector in (path.vector, None))
    torch.testing.assert_close(gains[1], with_it - without, atol=1e-5, rtol=1e-4)
    assert bool((path.scale(ROW[None]) == 1).all())


def test_without_mlps_the_ov_path_of_one_layer_is_all_that_heads_add() -> None:
    one = subject_of(linear_lm(mlp=torch.zeros(32, 32, dtype=torch.float64)), layer=1)
    gains = Path(one, ROW).gains()
    put = [TaskVector((*one.vector.edits, Edit(Site("heads", 2), Add(-row)))) for row in gains[2]]
    last = Site("resid", 2)
    trials = [one.states([prompt], vector, [last])[last][0] for prompt, vector in zip(one.bare, put, strict=True)]
    clean = one.states(one.bare, None, [last])[last]
    torch.testing.assert_close(torch.stack(trials) - clean, ROW.expand(len(clean), -1), atol=1e-5, rtol=1e-4)


def test_mlps_make_their_matrix_of_a_vector() -> None:
    path = Path(linear(), ROW)
    for layer, found in path.through_mlps().items():
        weight = linear().lm.model.model.layers[layer].mlp.weight.detach().float()
        torch.testing.assert_close(found, (weight @ ROW).expand_as(found), atol=1e-5, rtol=1e-4)


def test_a_scaled_rotation_is_found_and_random_vectors_turn_alike() -> None:
    q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    eye = torch.eye(32, dtype=torch.float64)
    one = subject_of(linear_lm(mlp=1.5 * q - eye, ov=0.0), layer=1)
    found = rotation(one).found
    turn = float(torch.cosine_similarity(ROW.double(), q @ ROW.double(), dim=0))
    assert value(found, layer=1, measure="cos(v, Qv)", of="the vector").value == pytest.approx(turn, abs=1e-5)
    for of in ("the vector", "random vectors"):
        assert value(found, layer=1, measure="|Sv| / |v|", of=of).value == pytest.approx(1.5, abs=1e-4)
        assert value(found, layer=0, measure="|Sv| / |v|", of=of).value == pytest.approx(2.25, abs=1e-4)
        assert value(found, layer=2, measure="cos(v, Qv)", of=of).value == pytest.approx(1, abs=1e-6)


def test_a_rotations_interval_is_that_of_maps_without_a_group() -> None:
    """Attention makes each prompt's map another one; the last layer's is the identity in all."""
    one = linear()
    found = rotation(one).found
    stretches = []
    for group in grouped(one):
        kept = [prompt for i, prompt in enumerate(one.bare) if i not in group]
        j = torch.stack([product(matrices(one.lm, len(prompt))[1:]) for prompt in kept]).mean(0)
        values, vectors = torch.linalg.eigh(j.T @ j)
        root = vectors * values.sqrt() @ vectors.T
        stretches.append(float((root @ ROW.double()).norm() / ROW.double().norm()))
    n = len(stretches)
    spread = ((n - 1) / n * float(((np.array(stretches) - np.mean(stretches)) ** 2).sum())) ** 0.5
    own = value(found, layer=0, measure="|Sv| / |v|", of="the vector")
    assert spread > 0
    assert own.high - own.value == pytest.approx(float(stats.t.ppf(0.975, n - 1)) * spread, rel=0.02)
    assert own.value - own.low == pytest.approx(own.high - own.value, rel=1e-6)
    last = value(found, layer=2, measure="cos(v, Qv)", of="the vector")
    assert last.high - last.low < 1e-5


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    values = np.random.default_rng(0).normal(size=9)
    found = jackknifed(float(values.mean()), [float(np.delete(values, i).mean()) for i in range(9)])
    expected = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert jackknifed(2.0, [1.0]) == Metric(2.0, 2.0, 2.0)


def test_pairs_are_left_out_with_their_vector() -> None:
    table = torch.arange(16.0).reshape(4, 4)
    found = paired(
        table, [(0, 1), (0, 2), (1, 3)]
    )  # 1, 2, 7; without vector 0: 7; 1: 2; 2: (1 + 7) / 2; 3: (1 + 2) / 2
    assert found == jackknifed(10 / 3, [7.0, 2.0, 4.0, 1.5])
    alone = paired(table, [(0, 1), (0, 2)])  # vector 0 is in both
    assert alone == Metric(1.5, 1.5, 1.5)


def test_a_linear_networks_saliency_is_its_derivative_and_small_heads_match_ablation() -> None:
    one = subject_of(linear_lm(ov=0.01))
    above = [(layer, head) for layer in (1, 2) for head in range(4)]
    first = salience(one)[:, [layer for layer, _ in above], [head for _, head in above]]
    torch.testing.assert_close(ablated(one, above), -first, atol=1e-7, rtol=0.1)


def test_a_random_vector_is_flat_where_nothing_reads_it() -> None:
    """Without attention and MLPs the stream carries a vector to the end as it is: no layer matters."""
    one = subject_of(linear_lm(mlp=torch.zeros(32, 32, dtype=torch.float64), ov=0.0))
    found = ANALYSES["sweep"](one).found
    for strength in (0.5, 4.0):
        at = {"vector": "random", "strength": strength, "measure": "d_ntp_full"}
        curve = [value(found, layer=layer, **at).value for layer in range(3)]
        assert curve == pytest.approx([curve[0]] * 3, rel=1e-5)


# --- formulas, written out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "falcon", "qwen3", "gemma3", "olmo2", "phi3"])
def test_gains_are_the_weight_on_itself_times_the_value_of_the_scaled_vector(family: str) -> None:
    """With attention pattern and norm scale as they are."""
    lm = tiny.tiny_lm(family)
    one = subject_of(lm, row=tiny.random_vector(lm.width(Site("resid", 0)), 4), n=3)
    path = Path(one, one.direction)
    h = one.states(one.bare, path.vector, [Site("resid", 0)])[Site("resid", 0)]
    weights = attention(lm, one.bare, path.vector)
    for i, state in enumerate(h):
        scaled = _value(lm, family, 1, state, one.direction)
        expected = scaled.reshape(lm.n_heads, -1) * weights[i][1, :, -1][:, None]
        torch.testing.assert_close(path.gains()[1][i], expected.flatten(), atol=1e-5, rtol=1e-3)


@torch.no_grad()
def _value(lm: LM, family: str, layer: int, h: Tensor, row: Tensor) -> Tensor:
    """W_V of the vector, as the block's own norm scales it at h, once for each query head."""
    centred = (row - row.mean()) / (h.var(correction=0) + 1e-5).sqrt()
    if family in ("gpt2", "gptj"):
        block = lm.model.transformer.h[layer]
        scaled: Tensor = block.ln_1.weight * centred
        out: Tensor = block.attn.c_attn.weight[:, 64:].T @ scaled if family == "gpt2" else block.attn.v_proj(scaled)
        return out
    if family == "gpt_neox":  # one matrix, head by head: its query, key and value
        block = lm.model.gpt_neox.layers[layer]
        fused = block.attention.query_key_value.weight.reshape(lm.n_heads, 3, -1, len(row))
        out = (fused[:, 2] @ (block.input_layernorm.weight * centred)).flatten()
        return out
    if family == "falcon":  # one matrix: all queries, then one key and one value for all heads
        block = lm.model.transformer.h[layer]
        size = len(row) // lm.n_heads
        shared = block.self_attention.query_key_value.weight[-size:] @ (block.input_layernorm.weight * centred)
        out = shared.repeat(lm.n_heads)
        return out
    block = lm.model.model.layers[layer]
    if family == "olmo2":  # no norm before attention
        scaled = row
    else:
        gamma = block.input_layernorm.weight + (1 if family == "gemma3" else 0)
        scaled = gamma * row / (h.square().mean() + 1e-6).sqrt()
    if family == "phi3":  # one matrix of queries, keys and values
        keys = lm.config.num_key_value_heads * block.self_attn.head_dim
        values_ = block.self_attn.qkv_proj.weight[-keys:]
    else:
        values_ = block.self_attn.v_proj.weight
    narrow = (values_ @ scaled).reshape(-1, block.self_attn.head_dim)
    out = narrow.repeat_interleave(lm.n_heads // len(narrow), 0).flatten()
    return out


@both_families
def test_the_norms_scale_is_found_by_trying(family: str) -> None:
    scale = norm_scale(tiny.tiny_lm(family), ROW)
    h = tiny.random_vector(64, 7).reshape(2, 32)
    expected = h.square().mean(1).sqrt() if family == "llama" else h.std(1, correction=0)
    torch.testing.assert_close(scale(h), expected)


@both_families
def test_attention_is_the_models_own_and_sums_to_one(family: str) -> None:
    one = subject_of(tiny.tiny_lm(family), n=2)
    before = one.lm.config._attn_implementation
    for prompt, found in zip(one.bare, attention(one.lm, one.bare, one.vector), strict=True):
        assert found.shape == (one.lm.n_layers, 4, len(prompt))
        torch.testing.assert_close(found.sum(-1), torch.ones(one.lm.n_layers, 4))
    bare = attention(one.lm, one.bare, None)
    torch.testing.assert_close(bare[0][0], attention(one.lm, one.bare, one.vector)[0][0])  # below the vector
    assert one.lm.config._attn_implementation == before


@both_families
def test_saliency_is_the_gradient_by_the_heads_output_times_it(family: str) -> None:
    one = subject_of(exact_lm(family), n=2)
    found = salience(one)
    for i, prompt in enumerate(one.bare):
        for layer in range(one.lm.n_layers):
            site = Site("heads", layer)
            nudge = torch.zeros(one.lm.width(site), dtype=torch.float64, requires_grad=True)
            vector = TaskVector((*one.vector.edits, Edit(site, Add(nudge))))
            with torch.enable_grad(), inject(one.lm, vector), capture(one.lm, [site]) as seen:
                p = one.lm.forward(one.lm.batch([prompt]))[0, -1].softmax(-1)[one.golds[i]]
                (gradient,) = torch.autograd.grad(p, nudge)  # nothing is left on the model, which other tests share
            expected = (gradient * seen[site][0, -1].detach()).reshape(one.lm.n_heads, -1).sum(1)
            torch.testing.assert_close(found[i, layer], expected.float(), atol=1e-6, rtol=1e-3)


def test_an_ablated_head_hands_over_nothing() -> None:
    one = subject_of(tiny.tiny_lm("llama"), n=2)
    found = ablated(one, [(1, 2)])
    for i, prompt in enumerate(one.bare):
        p = []
        for zero in (False, True):
            with torch.no_grad(), inject(one.lm, one.vector):
                handle = one.lm.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
                    lambda _, args: (_without(args[0], 2),) if zero else None  # noqa: B023
                )
                p.append(one.lm.forward(one.lm.batch([prompt]))[0, -1].softmax(-1)[one.golds[i]])
                handle.remove()
        torch.testing.assert_close(found[i, 0], p[1] - p[0], atol=1e-6, rtol=1e-3)


def _without(z: Tensor, head: int) -> Tensor:
    z = z.clone()
    z[:, -1, 8 * head : 8 * head + 8] = 0
    return z


def test_random_heads_lie_in_the_same_layers() -> None:
    key = [(3, 0), (3, 5), (7, 1)]
    for seed in range(5):
        found = matched(key, 8, seed=seed)
        assert [layer for layer, _ in found] == [3, 3, 7]
        assert len(set(found)) == 3
        assert not set(found) & set(key)


def test_heads_are_ranked_by_mean_absolute_saliency() -> None:
    saliency = torch.tensor([[[1.0, -3.0], [0.5, 0.0]], [[-1.0, 3.0], [0.5, 0.1]]])
    assert ranking(saliency, [(0, 0), (0, 1), (1, 0), (1, 1)]) == [(0, 1), (0, 0), (1, 0), (1, 1)]


def test_doses_and_their_null_are_measured_on_the_other_half() -> None:
    found = heads(subject_of(tiny.tiny_lm("llama"), n=6))
    rows = found.frame.filter(found.frame["percent"].is_not_null())
    assert len(rows) == 2 * 2 * (1 + len(DOSES))
    assert set(rows["heads"]) == {"key heads", NULL}
    assert all(value * 3 == pytest.approx(round(value * 3)) for value in rows.filter(rows["heads"] != NULL)["value"])


def test_values_of_one_token_are_each_layers_own() -> None:
    lm = tiny.tiny_lm("llama")
    found = values(lm, torch.stack([ROW, torch.zeros(32)]))
    for layer in range(lm.n_layers):
        expected = _value(lm, "llama", layer, ROW, ROW)
        torch.testing.assert_close(found[0, layer] - found[1, layer], expected, atol=1e-5, rtol=1e-4)


@both_families
@pytest.mark.parametrize("beside", [False, True])
def test_the_path_is_put_in_or_taken_out_before_the_output_projections(family: str, beside: bool) -> None:
    """Against hooks of its own: the vector's place is empty, or it is there and what heads read off it is not."""
    one = subject_of(tiny.tiny_lm(family), n=2)
    path = Path(one, ROW)
    gains = path.gains()
    vectors = _edits(one, "heads", gains, 2, beside=path.vector if beside else None)
    found = one.engine.answer([Trial(i, v) for i, v in enumerate(vectors)], Ask(keep=lambda _, logits: logits)).kept
    blocks_ = blocks(one.lm.model)
    for i, prompt in enumerate(one.bare):
        handles = []
        for layer, rows in gains.items():
            part = blocks_[layer].self_attn.o_proj if family == "llama" else blocks_[layer].attn.c_proj
            handles.append(part.register_forward_pre_hook(_moved(-rows[i] if beside else rows[i])))
        change = {0: lambda h: torch.cat([h[:-1], h[-1:] + ROW])} if beside else {}
        expected = run(one.lm.model, prompt.ids, change).logits[-1].detach()
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=1e-4)


def _moved(row: Tensor) -> Callable[..., Any]:
    return lambda _, args: (torch.cat([args[0][:, :-1], args[0][:, -1:] + row], 1),)


def test_heads_that_do_not_look_at_one_token_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject_of(tiny.tiny_lm("llama"))
    monkeypatch.setattr(ov_module, "attention", lambda lm, prompts, vector: [torch.full((3, 4, 1), 0.9)])
    with pytest.raises(ModelError, match="gates or attention sinks"):
        ov(one)


def test_a_sum_below_is_left_out_where_attention_ends_with_a_norm() -> None:
    for family, there in (("llama", True), ("gemma3", False)):
        lm = tiny.tiny_lm(family)
        found = ov(subject_of(lm, row=tiny.random_vector(lm.width(Site("resid", 0)), 4), n=2)).frame
        assert ("ov, summed below" in found["way"]) == there


def test_cumulative_curves_end_where_the_variant_of_all_layers_is() -> None:
    one = subject_of(tiny.tiny_lm("llama"))
    found = ov(one).found
    for way, part in (("ov", "instead"), ("mlp", "instead"), ("without ov", "beside")):
        end = value(found, vector=VECTOR, part=part, way=way, layer=2).value
        assert end == value(found, vector=VECTOR, part="variants", way=way).value
    for way, vector in (("itself", one.vector), ("zero-shot", None)):
        assert value(found, vector=VECTOR, part="variants", way=way).value == one.accuracy(vector).value


def test_gains_in_another_run_take_its_weights_and_scales() -> None:
    one = subject_of(tiny.tiny_lm("llama"))
    own, other = Path(one, one.direction), Path(one, one.random(0))
    for layer, rows in other.gains(run=own).items():
        read = other.values[layer].reshape(4, -1) * float(other.scale(other.row[None])[0])
        expected = read * (own.weights[:, layer] / own.scales[layer][:, None])[..., None]
        torch.testing.assert_close(rows, expected.flatten(1))
        assert not torch.allclose(rows, other.gains()[layer])


def test_the_null_of_necessity_takes_random_paths_out_beside_the_vector() -> None:
    one = subject_of(tiny.tiny_lm("llama"))
    said = one.engine.answer([Trial(i, one.vector) for i in range(len(one.bare))], Ask(keep=likeliest)).kept
    vars(one)["golds"] = said.long().tolist()  # what the vector makes likeliest: it is right on all
    paths = [Path(one, one.random(number)) for number in range(ov_module.DRAWS)]

    own = Path(one, one.direction)

    def accuracy(path: Path, beside: Path) -> float:
        taken = _edits(one, "heads", path.gains(run=own), 2, beside=beside.vector)
        return float(one.hits(taken).float().mean())

    found = value(ov(one).found, vector=ov_module.NULL, part="variants", way="without ov").value
    assert found == pytest.approx(np.mean([accuracy(path, own) for path in paths]))
    assert found != pytest.approx(np.mean([accuracy(path, path) for path in paths]))


# --- polar, ranks, clusters ------------------------------------------------------------------------------------------


def test_a_polar_decomposition_is_one() -> None:
    w = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, s = polar(w)
    eye = torch.eye(40, dtype=torch.float64)
    for found, expected in ((q.T @ q, eye), (s, s.T), (q @ s, w)):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert float(torch.linalg.eigvalsh(s).min()) >= -1e-12
    torch.testing.assert_close(polar(eye)[0], eye)
    torch.testing.assert_close(polar(3 * q)[0], q, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("sigma", "expected"), [(0.1, 0.998), (0.5, 0.93), (1, 0.76), (2, 0.45), (4, 0.23)])
def test_random_maps_turn_every_vector_by_as_much(sigma: float, expected: float) -> None:
    """The null: I + sigma G turns any vector, so a turned task vector is no evidence by itself."""
    generator = torch.Generator().manual_seed(1)
    w = (
        torch.eye(256, dtype=torch.float64)
        + sigma * torch.randn(256, 256, dtype=torch.float64, generator=generator) / 16
    )
    rows = torch.randn(50, 256, dtype=torch.float64, generator=generator)
    found = torch.cosine_similarity(rows, rows @ polar(w)[0].T, dim=1).mean()
    assert float(found) == pytest.approx(expected, abs=0.05)


def test_few_draws_fit_anything_and_are_refused() -> None:
    """A min-norm fit of 64 noised copies explains the vector itself and is nowhere near the map."""
    generator = torch.Generator().manual_seed(2)
    d = 64
    true = torch.eye(d) + torch.randn(d, d, generator=generator) / d**0.5
    own = torch.randn(d, generator=generator)
    own /= own.norm()
    rows = own + 0.05 * torch.randn(d // 2, d, generator=generator) / d**0.5
    moved = rows @ true.T
    vacuous = torch.linalg.lstsq(rows, moved, driver="gelsd").solution.T
    assert float((vacuous @ own - true @ own).norm() / (true @ own).norm()) < 0.02
    assert float((vacuous - true).norm() / true.norm()) > 0.5
    with pytest.raises(InputError, match=r"at least 256 draws for a map of 64 dimensions; found 32"):
        fitted_map(rows, moved)
    many = torch.randn(4 * d, d, generator=generator)
    torch.testing.assert_close(fitted_map(many, many @ true.T), true, atol=1e-4, rtol=1e-3)


def test_what_is_explained_of_mean_shifts() -> None:
    mean = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    found = mean[:, None] + torch.tensor([-1.0, 0.0, 1.0])[None, :, None]
    assert explained(mean, found).value == pytest.approx(1)
    assert explained(torch.zeros(2, 2), found).value == pytest.approx(0)
    assert explained(-mean, found).value == pytest.approx(-3)
    same = explained(mean, mean[:, None].expand(-1, 3, -1))
    assert (same.low, same.high) == pytest.approx((1, 1))
    assert explained(mean, found).low < 0.99  # prompts differ


def test_what_is_explained_of_draws() -> None:
    moved = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert fits(moved, moved).value == 1
    assert fits(torch.zeros(2, 2), moved).value == 0
    assert fits(-moved, moved).value == -3


def test_shifts_that_prompts_share() -> None:
    eye = torch.eye(4)
    assert alike(eye[:1].expand(4, -1)[None]).value == pytest.approx(1)
    assert alike(eye[None]).value == pytest.approx(1 / 4)
    assert alike(torch.stack([eye, eye[:1].expand(4, -1)])).value == pytest.approx(5 / 8)


def test_effective_rank_counts_directions() -> None:
    eye = torch.eye(8)
    assert effective_rank(eye[:5]) == pytest.approx(5)
    assert effective_rank(torch.cat([eye[:1]] * 4)) == pytest.approx(1)
    assert effective_rank(torch.cat([eye[:2]] * 3) * torch.arange(1, 7)[:, None]) == pytest.approx(2)


def test_clear_groups_are_found() -> None:
    base = torch.eye(6)[:3].repeat_interleave(3, 0)
    rows = base + 0.05 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    table, names = cosines(rows).double().numpy(), np.repeat(np.arange(3), 3)
    assert nearest(table, names) == 1
    assert len({tuple(sorted(np.flatnonzero(clustered(table, 3) == label))) for label in clustered(table, 3)}) == 3
    assert nearest(table, np.arange(9)) == 0


# --- libraries and conflicts -----------------------------------------------------------------------------------------


def tiny_subject(beside: Beside, n: int = 8) -> Subject:
    lm = LM.load("tiny")
    task = load_task("tiny_upper", shots=4, n_test=10)
    vector = TaskVector((Edit(Site("resid", 1), Add(tiny.random_vector(64, 1))),))
    return Subject.of(lm, vector, task, n=n, beside=beside)


def test_a_library_of_fitted_vectors() -> None:
    from taskvec.methods.mean_difference import MeanDifference

    lm, made = LM.load("tiny"), list[TaskVector]()
    for name in ("tiny_upper", "tiny_successor"):
        task = load_task(name, shots=4, n_test=8)
        made += [
            MeanDifference(site="resid[1]", queries=6, n_dev=2).fit(lm, task.train, task.dev, seed=s) for s in (0, 1)
        ]
    task = load_task("tiny_upper", shots=4, n_test=8)
    one = Subject.of(lm, made[0], task, n=6, beside=Beside(vectors=tuple(made[1:])))
    found = geometry(one).found
    rows = torch.stack([vector.edits[0].op.tensors()["vector"] for vector in made])
    table = torch.nn.functional.normalize(rows) @ torch.nn.functional.normalize(rows).T
    same = float((table[0, 1] + table[2, 3]) / 2)
    assert value(found, measure="cosine", of="same task, layer, method").value == pytest.approx(same, abs=1e-5)
    sums = made[0].edits[0].op.tensors()["vector"] - rows[2] + rows[3]
    expected = one.accuracy(one.added(sums, 1)).value
    assert value(found, of="a - b + c on tiny_upper", kind="vectors").value == expected
    rank = value(found, measure="effective rank", kind="null").value
    assert 3.5 < rank <= 4


def test_too_small_a_library_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 3 other vectors; found 0; name folders .* with --beside"):
        geometry(tiny_subject(Beside()))


def test_a_conflict_counts_both_tasks_answers() -> None:
    other = load_task("tiny_next_vowel", shots=4, n_test=8)
    one = tiny_subject(Beside(other), n=10)
    found = conflict(one)
    curves = {of["whose"] for of, _ in found.found if "whose" in of}
    assert len(curves) == 4
    assert sum("held out" in of for of, _ in found.found) == 4
    alone = value(found.found, whose="the prompt's task", layer=-1).value
    assert alone == value(found.found, whose="the prompt's task, random vector", layer=-1).value
    assert alone > 0.5  # the tiny model follows its examples
    prompts, own, shown = disputed(one)
    with inject(one.lm, one.added(one.direction, 2)), torch.no_grad():
        said = [int(one.lm.forward(one.lm.batch([prompt]))[0, -1].argmax()) for prompt in prompts]
    for whose, golds in (("the vector's task", own), ("the prompt's task", shown)):
        expected = np.mean([a == b for a, b in zip(said, golds, strict=True)])
        assert value(found.found, whose=whose, layer=2).value == pytest.approx(expected)


def test_common_queries_are_those_with_another_answer() -> None:
    upper, other = (load_task(name, shots=4, n_test=10) for name in ("tiny_upper", "tiny_next_vowel"))
    known = {example.input: example.output for example in other.examples}
    assert len(common(upper.test, other)) == 10
    for i, output in common(upper.test, other):
        assert known[upper.test.examples[i].input] == output != upper.test.examples[i].output
    assert rival(load_task("past_tense")) in ("gerund", "third_person")


def test_no_other_task_is_refused() -> None:
    with pytest.raises(InputError, match="another task with the same queries"):
        conflict(tiny_subject(Beside()))
    far = load_task("country_capital")
    with pytest.raises(InputError, match=r"at least 8 test queries that both tasks answer"):
        conflict(tiny_subject(Beside(far)))


def test_a_vector_with_no_head_above_it_is_refused() -> None:
    last = subject_of(tiny.tiny_lm("llama"), layer=2)
    with pytest.raises(InputError, match="a vector below layer 2"):
        ov(last)
    with pytest.raises(InputError, match="heads above the vector; found 0"):
        heads(last)


@pytest.mark.slow
@both_families
def test_every_analysis_draws_and_says(family: str) -> None:
    one = subject_of(tiny.tiny_lm(family))
    for name in ("lens", "ov", "heads", "propagation", "rotation", "sweep"):
        found: Finding = ANALYSES[name](one)
        assert found.name == name
        assert found.says.endswith(".")
        assert found.picture.svg.startswith("<?xml")
        assert len(found.picture.drawings) == len(found.panels)
        assert (found.frame["low"] <= found.frame["high"]).all()
