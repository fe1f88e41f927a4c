"""Theory in numbers: each statement holds, agrees with a computation written otherwise, and fails once broken."""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from taskvec.evaluate.expansion import Expansion
from taskvec.lm import LM, Encoded
from taskvec.sites import Site
from taskvec.theory import Theorem, __main__, lora, pointwise, prefix, ratios, theorems
from taskvec.theory.statement import EXACT, effective_rank, expected_miss, generator, miss, normal, rank, with_ones
from taskvec.vector import Add, Edit, TaskVector, Where

Patch = pytest.MonkeyPatch
SEEDS = (0, 1, 2)
NAMES = {"E1", "E2a", "E2b", "E2c", "E2d", "E3a", "E3b", "E3c", "E3d"}


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_every_statement_holds(seed: int) -> None:
    before = torch.get_rng_state()
    rows = theorems(seed)
    assert torch.equal(before, torch.get_rng_state())
    assert [row for row in rows if not row.holds] == []
    assert {row.name.split()[0] for row in rows} == NAMES
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.says.endswith(".") and math.isfinite(row.measured) for row in rows)


def test_a_seed_fixes_the_numbers_and_another_changes_them() -> None:
    some = (lora.no_lora, lora.spread, prefix.closed_form, ratios.vector_at_last)
    for statement in some:
        assert statement(3) == statement(3)
        assert statement(3).measured != statement(4).measured


@pytest.mark.parametrize(
    ("relation", "measured", "holds"),
    [
        ("equal", 1.1, True),
        ("equal", 0.9, True),
        ("equal", 1.2, False),
        ("at most", 1.1, True),
        ("at most", -5.0, True),
        ("at most", 1.2, False),
        ("at least", 0.9, True),
        ("at least", 5.0, True),
        ("at least", 0.8, False),
        *((name, math.nan, False) for name in ("equal", "at most", "at least")),
    ],
)
def test_when_a_statement_holds(relation: str, measured: float, holds: bool) -> None:
    row = Theorem("E0", "It is one.", relation, 1.0, measured, 0.11)  # type: ignore[arg-type]
    assert row.holds is holds


def test_the_table_and_its_exit_code(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = (Theorem(f"E0 {x}", "It is one.", "equal", 1.0, x, 0.1) for x in (1.0, 2.0))
    asked = list[int]()

    def some(*rows: Theorem) -> Callable[[int], tuple[Theorem, ...]]:
        def run(seed: int) -> tuple[Theorem, ...]:
            asked.append(seed)
            return rows

        return run

    monkeypatch.setattr(__main__, "theorems", some(good, bad))
    assert __main__.main([]) == 1
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["statement", "predicted"]
    assert first.split() == ["E0", "1.0", "=", "1", "1", "0.1", "yes", "It", "is", "one."]
    assert "NO" in second
    assert __main__.main(["--json"]) == 1
    assert [row["holds"] for row in json.loads(capsys.readouterr().out)["theorems"]] == [True, False]
    monkeypatch.setattr(__main__, "theorems", some(good))
    assert __main__.main(["--json", "--seed", "7"]) == 0
    only = {"name": "E0 1.0", "says": "It is one.", "relation": "equal", "predicted": 1.0, "measured": 1.0}
    assert json.loads(capsys.readouterr().out) == {"theorems": [{**only, "tolerance": 0.1, "holds": True}]}
    assert asked == [0, 0, 7]


# --- the tools -------------------------------------------------------------------------------------------------------


def test_miss_by_gram_schmidt() -> None:
    features, targets = normal(generator(1), 12, 5), normal(generator(2), 12, 3)
    basis = list[Tensor]()
    for column in features.T:
        for other in basis:
            column = column - (column @ other) * other
        basis.append(column / column.norm())
    left = targets.clone()
    for j in range(targets.shape[1]):
        for direction in basis:
            left[:, j] -= (left[:, j] @ direction) * direction
    assert miss(features, targets) == pytest.approx(float(left.norm() / targets.norm()), abs=1e-12)


def test_expected_miss_by_simulation() -> None:
    """400 random subspaces: their mean is the predicted one, and four deviations are no more than the tolerance."""
    n, k, source = 30, 9, generator(0)
    targets = normal(source, n, 2) @ normal(source, 2, 6)
    predicted, tolerance = expected_miss(n, k, targets)
    seen = torch.tensor([miss(normal(source, n, k), targets) for _ in range(400)])
    assert float(seen.square().mean().sqrt()) == pytest.approx(predicted, abs=tolerance / 4 / 20 * 4)
    assert 0.5 * tolerance < 4 * float(seen.std()) < 1.15 * tolerance
    assert expected_miss(5, 9, targets[:5]) == (0.0, EXACT)


def test_ranks_by_eigenvalues() -> None:
    matrix = normal(generator(0), 20, 3) @ normal(generator(1), 3, 7)
    values = [math.sqrt(v) for v in torch.linalg.eigvalsh(matrix.T @ matrix).tolist()[-3:]]
    entropy = -sum(v / sum(values) * math.log(v / sum(values)) for v in values)
    assert rank(matrix) == 3
    assert effective_rank(matrix) == pytest.approx(math.exp(entropy), rel=1e-6)
    assert effective_rank(torch.eye(4, dtype=torch.float64)) == pytest.approx(4.0)
    assert effective_rank(torch.diag(torch.tensor([1.0, 0.0, 0.0]).double())) == pytest.approx(1.0)


# --- E1 --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(lm: LM, ids: tuple[int, ...], rows: list[Tensor], last_only: bool = True) -> Tensor:
    """A GPT-2 block by block: no hook, no inject."""
    inner = lm.model.transformer
    h = inner.wte(torch.tensor([ids])) + inner.wpe(torch.arange(len(ids))[None])
    for block, row in zip(inner.h, rows, strict=True):
        out = block(h)
        h = (out[0] if isinstance(out, tuple) else out).clone()
        h[0, -1 if last_only else slice(None)] += pointwise.STRENGTH * row
    logits: Tensor = lm.model.lm_head(inner.ln_f(h))[0, -1]
    return logits


def test_the_vectors_by_hand() -> None:
    s = pointwise.setting(1)
    nothing = [torch.zeros(32, dtype=torch.float64)] * 3
    bare, wanted = (by_hand(lm, s.prompt.ids, nothing) for lm in (s.base, s.lora))
    rows = pointwise.per_layer(s.base, s.lora, s.prompt)
    effect = (wanted - bare).abs().max()
    assert float(effect) == pytest.approx(pointwise.lora_matters(1).measured)
    assert float((by_hand(s.base, s.prompt.ids, rows) - wanted).abs().max() / effect) < 1e-12
    everywhere = by_hand(s.base, s.prompt.ids, rows, last_only=False)
    assert float((everywhere - wanted).abs().max() / effect) == pytest.approx(pointwise.broadcast(1).measured)


def test_the_lora_is_one() -> None:
    s = pointwise.setting(1)
    changed = list[str]()
    for (name, weight), other in zip(s.base.model.named_parameters(), s.lora.model.parameters(), strict=True):
        if not torch.equal(weight, other):
            changed.append(name)
            assert rank((other - weight).detach()) == 2
    assert changed == [f"transformer.h.{layer}.attn.c_attn.weight" for layer in range(3)]


def test_what_e1_is_not() -> None:
    """At the last layer alone all tokens may have it; and a change behind the last site is out of reach."""
    s = pointwise.setting(1)
    (wanted, _), (bare, _) = (pointwise.run(lm, s.prompt, TaskVector(())) for lm in (s.lora, s.base))
    op = Add((wanted[-1] - bare[-1]) / pointwise.STRENGTH)
    vector = TaskVector((Edit(Site("resid", 2), op, Where("all"), pointwise.STRENGTH),))
    assert pointwise.share(s.base, s.lora, s.prompt, vector) < EXACT
    beyond = pointwise._with_noise(s.base.model, generator(5))
    beyond.transformer.ln_f.weight.data += 0.1 * normal(generator(6), 32)
    other = LM(beyond, name="beyond")
    rows = pointwise.per_layer(s.base, other, s.prompt)
    vector = pointwise._vector(rows, range(3), "last_prompt")
    assert pointwise.share(s.base, other, s.prompt, vector) > pointwise.MOVES


def test_broken_vectors_fail(monkeypatch: Patch) -> None:
    good = pointwise.per_layer

    def stale(base: LM, changed: LM, prompt: Encoded) -> list[Tensor]:
        """Differences of two clean runs: the effect of earlier vectors is counted twice."""
        (wanted, _), (bare, _) = (pointwise.run(lm, prompt, TaskVector(())) for lm in (changed, base))
        return [(w - b) / pointwise.STRENGTH for w, b in zip(wanted, bare, strict=True)]

    monkeypatch.setattr(pointwise, "per_layer", stale)
    assert not pointwise.every_layer(1).holds
    monkeypatch.setattr(pointwise, "per_layer", lambda *given: [row * 0 for row in good(*given)])
    assert pointwise.broadcast(1).measured == pytest.approx(1.0)
    assert not pointwise.every_layer(1).holds


# --- E2 --------------------------------------------------------------------------------------------------------------


def test_the_oracle_by_its_own_inverse() -> None:
    """E is the mixing's inverse, then B: no least squares."""
    source = generator(0)
    h, a, b, other = (normal(source, *s) for s in ((50, 8), (2, 8), (8, 2), (50, 3)))
    mixing = normal(source, 5, 5)
    z = torch.cat([h @ a.T, other], 1) @ mixing
    change = torch.stack([b @ (a @ row) for row in h])
    e = torch.linalg.inv(mixing) @ torch.cat([b.T, torch.zeros(3, 8).double()])
    torch.testing.assert_close(z @ e, change, atol=1e-11, rtol=0)
    torch.testing.assert_close(lora.lora_change(h, a, b), change)
    assert miss(with_ones(z), change) < EXACT
    assert miss(with_ones(z[:, 1:]), change) > 0.01  # one coordinate fewer, and A h cannot be read


def test_an_oracle_needs_all_of_a_linear_change(monkeypatch: Patch) -> None:
    def cubed(states: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (states @ a.T) ** 3 @ b.T

    monkeypatch.setattr(lora, "lora_change", cubed)
    assert not lora.oracle(0).holds
    assert lora.oblivious(0).holds


def test_vectors_are_a_lora_up_to_the_rank_of_the_states() -> None:
    assert [lora.as_lora(0, n=n).holds for n in (1, 20, 32, 33, 200)] == [True, True, True, False, False]
    assert lora.no_lora(0, n=33).measured > 0.01
    assert [lora.as_lora_of_rank(0, n=n, bottleneck=r).measured for n, r in ((20, 3), (20, 5), (2, 5))] == [4, 6, 2]


def test_a_bias_is_what_makes_a_static_vector_a_lora(monkeypatch: Patch) -> None:
    monkeypatch.setattr(lora, "with_ones", lambda features: features)
    assert not lora.static_with_bias(0).holds
    assert lora.static_without_bias(0).holds


def test_the_implemented_rank_by_columns() -> None:
    """The span of the stacked vectors is that of E's columns and b, stacked over the layers."""
    source = generator(0)
    written = lora.expansion(source, 8, 3, layers=3)
    rows = written(normal(source, 200, 8))
    assert written.read is not None
    stacked = torch.cat([written.write.permute(2, 0, 1).flatten(1), written.bias.flatten()[None]])
    for x in range(3):
        for layer in range(3):
            z = written.read @ normal(generator(x), 8)
            want = [float(written.write[layer, i] @ z) + float(written.bias[layer, i]) for i in range(lora.WIDTH)]
            got = written(normal(generator(x), 8)[None])[0, layer]
            torch.testing.assert_close(got, torch.tensor(want).double())
    assert (
        rank(torch.cat([stacked, rows.flatten(1)])) == rank(stacked) == lora.implemented_rank(0, bottleneck=3).predicted
    )


def test_a_wrong_rank_is_reported(monkeypatch: Patch) -> None:
    good = lora.expansion

    def bent(source: torch.Generator, *sizes: int | None, **named: int) -> Callable[[Tensor], Tensor]:
        expansion: Expansion = good(source, *sizes, **named)  # type: ignore[arg-type]
        return lambda z: torch.tanh(expansion(z))

    monkeypatch.setattr(lora, "expansion", bent)
    for bottleneck in (None, 3):
        row = lora.implemented_rank(0, bottleneck=bottleneck)
        assert row.measured > row.predicted
        assert not row.holds


# --- E3a, E3b --------------------------------------------------------------------------------------------------------


def loops(query: list[float], keys: list[list[float]]) -> list[float]:
    """Unnormalised attention weights."""
    return [math.exp(sum(q * k for q, k in zip(query, key, strict=True)) / math.sqrt(len(query))) for key in keys]


def test_the_prefix_identity_by_loops() -> None:
    head = prefix.Head.random(3, n=4)
    update, rho = head.update(prefix.attend), prefix.prefix_share(head.queries, head.prefix_keys, head.keys)
    for i, query in enumerate(head.queries.tolist()):
        of_prefix, of_content = loops(query, head.prefix_keys.tolist()), loops(query, head.keys.tolist())
        z_p, z_x = sum(of_prefix), sum(of_content)
        assert float(rho[i]) == pytest.approx(z_p / (z_p + z_x), rel=1e-12)
        for j in range(prefix.VALUES):
            h = sum(w * float(v[j]) for w, v in zip(of_content, head.values, strict=True)) / z_x
            g = sum(w * float(v[j]) for w, v in zip(of_prefix, head.prefix_values, strict=True)) / z_p
            both = (z_x * h + z_p * g) / (z_x + z_p)
            assert float(update[i, j]) == pytest.approx(both - h, abs=1e-12)


def test_linear_attention_by_loops() -> None:
    head = prefix.Head.random(3, n=4)
    update = head.update(prefix.attend_linearly)
    for i, query in enumerate(head.queries):
        want = sum(float(query @ k) * v for k, v in zip(head.prefix_keys, head.prefix_values, strict=True))
        assert isinstance(want, Tensor)
        torch.testing.assert_close(update[i], want)


def test_a_prefix_renormalised_wrongly_is_reported(monkeypatch: Patch) -> None:
    good = prefix.prefix_share
    for wrong in (lambda rho: rho / (1 - rho), lambda rho: 0 * rho, lambda rho: rho + 1e-9):
        monkeypatch.setattr(prefix, "prefix_share", lambda q, p, k, wrong=wrong: wrong(good(q, p, k)))
        assert not prefix.identity(0).holds


def test_softmax_attention_is_not_the_linear_one(monkeypatch: Patch) -> None:
    monkeypatch.setattr(prefix, "attend_linearly", prefix.attend)
    assert not prefix.linear_rank(0).holds
    assert not prefix.linear_in_query(0).holds


# --- E3c -------------------------------------------------------------------------------------------------------------


def test_the_twins_cannot_be_told_apart() -> None:
    twins = prefix.Twins.random(2)
    keys = [x @ twins.w_k for x in twins.inputs]
    torch.testing.assert_close(keys[0], keys[1], atol=1e-13, rtol=0)
    assert torch.equal(twins.inputs[0, -1], twins.inputs[1, -1])
    assert float((twins.inputs[0] - twins.inputs[1])[:-1].norm(dim=1).min()) > 1.0
    h = twins.outputs()
    for x, got in zip(twins.inputs, h, strict=True):
        weights = loops((x[-1] @ twins.w_q).tolist(), (x @ twins.w_k).tolist())
        want = torch.stack([w / sum(weights) * (token @ twins.w_v) for w, token in zip(weights, x, strict=True)]).sum(0)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_floor_in_closed_form_and_on_a_grid(seed: int) -> None:
    twins = prefix.Twins.random(seed)
    h = twins.outputs()
    apart = h[0] - h[1]
    assert prefix.floor(h, 2 * h) == pytest.approx(0.5 * math.dist(h[0].tolist(), h[1].tolist()), rel=1e-12)
    assert prefix.floor(h, -h) == pytest.approx(0.5 * float(apart.norm()), rel=1e-12)  # t = 0
    assert prefix.floor(h, h / 2 + 3.0) < 1e-12
    targets = h + normal(generator(seed), 2, prefix.VALUES)
    grid = [0.5 * float((targets[0] - targets[1] - i / 1000 * apart).norm()) for i in range(1001)]
    assert prefix.floor(h, targets) <= min(grid) + 1e-12
    assert prefix.floor(h, targets) == pytest.approx(min(grid), rel=1e-5)


def test_random_prefixes_scale_the_difference_and_stay_above_the_floor() -> None:
    twins, source = prefix.Twins.random(1), generator(9)
    h = twins.outputs()
    least = prefix.floor(h, twins.targets)
    for tokens in (1, 1, 1, 3, 3, 3, 8, 8, 8):
        keys, values = normal(source, tokens, prefix.KEYS), 5 * normal(source, tokens, prefix.VALUES)
        moved = twins.outputs(prefix=(keys, values))
        ratio = (moved[0] - moved[1]) / (h[0] - h[1])
        assert 0 < float(ratio.min()) < 1
        assert float(ratio.max() - ratio.min()) < 1e-10
        assert twins.error(moved) > least


def test_the_best_prefix_reaches_the_floor_of_other_targets() -> None:
    """T+ - T- = 0.6 (h+ - h-) + something orthogonal: the least lies inside, at t = 0.6."""
    twins = prefix.Twins.random(0)
    h = twins.outputs()
    apart = h[0] - h[1]
    aside = normal(generator(3), prefix.VALUES)
    aside -= aside @ apart / apart.square().sum() * apart
    twins = replace(twins, targets=torch.stack([0.6 * apart + aside, 0 * apart]) + 1.0)
    least = prefix.floor(h, twins.targets)
    assert least == pytest.approx(0.5 * float(aside.norm()), rel=1e-12)
    found = twins.error(twins.outputs(prefix=prefix.best_prefix(twins)))
    assert least - EXACT <= found <= (1 + prefix.CLOSE) * least


def test_the_floor_needs_equal_keys() -> None:
    """What some prefix makes has floor 0, but not by this formula where keys, and so Z_X, differ."""
    equal, source = prefix.Twins.random(0), generator(4)
    told_apart = replace(equal, w_k=normal(source, prefix.STATES, prefix.KEYS) / math.sqrt(prefix.STATES))
    values, floors = 10 * normal(source, prefix.CONTENT, prefix.VALUES), list[float]()
    for twins in (equal, told_apart):
        pair = twins.inputs[0] @ twins.w_k, values  # Z_P is one input's Z_X
        floors.append(prefix.floor(twins.outputs(), twins.outputs(prefix=pair)))
    assert floors[0] < 1e-12
    assert floors[1] > 0.1


def test_broken_floors_and_searches_are_reported(monkeypatch: Patch) -> None:
    good = prefix.floor
    monkeypatch.setattr(prefix, "floor", lambda h, targets: 2 * good(h, targets))
    assert not prefix.closed_form(0).holds
    assert not prefix.none_below(0).holds
    assert not prefix.static_vector(0).holds
    monkeypatch.setattr(prefix, "floor", lambda h, targets: 0.9 * good(h, targets))
    assert not prefix.reached(0).holds
    monkeypatch.setattr(prefix, "with_ones", lambda z: z[:, :0])
    assert not prefix.adaptive_vector(0).holds


# --- E3d -------------------------------------------------------------------------------------------------------------


def test_ratios_by_loops() -> None:
    stack = ratios.Stack.random(2)
    layer, states = stack.second, stack.between
    query = (states[-1] + stack.vector) @ layer.w_q
    before, after = (
        loops(q.tolist(), (some @ layer.w_k).tolist())
        for q, some in ((states[-1] @ layer.w_q, states), (query, states + stack.vector))
    )
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    changes = {(i, j): math.log(after[i] / after[j]) - math.log(before[i] / before[j]) for i, j in pairs}
    moved, size = stack.vector @ layer.w_q, math.sqrt(ratios.WIDTH)
    for (i, j), change in changes.items():
        assert change == pytest.approx(float(moved @ ((states[i] - states[j]) @ layer.w_k)) / size, abs=1e-10)
    assert max(changes.values()) == pytest.approx(ratios.vector_at_all(2).measured, abs=1e-10)


def test_a_layer_by_loops() -> None:
    stack = ratios.Stack.random(2)
    layer, (keys, values) = stack.first, stack.prefix
    got = layer(stack.entering, stack.prefix)
    for t in range(ratios.CONTENT):
        seen = stack.entering[: t + 1]
        weights = loops((stack.entering[t] @ layer.w_q).tolist(), [*keys.tolist(), *(seen @ layer.w_k).tolist()])
        mixed = sum(w * v for w, v in zip(weights, [*values, *(seen @ layer.w_v)], strict=True)) / sum(weights)
        torch.testing.assert_close(got[t], stack.entering[t] + mixed)


def test_a_norm_is_what_moves_the_keys_apart(monkeypatch: Patch) -> None:
    normed = ratios.Stack.random(0, normed=True)
    monkeypatch.setattr(ratios.Stack, "random", lambda seed: normed)
    assert not ratios.keys_alone(0).holds
    assert not ratios.vector_at_all(0).holds
    assert not ratios.vector_at_last(0).holds
    assert ratios.prefix_here(0).holds


def test_a_prefix_that_shifts_scores_unevenly_is_reported(monkeypatch: Patch) -> None:
    good = ratios.Layer.log_weights

    def uneven(layer: ratios.Layer, asking: Tensor, states: Tensor, prefix: Tensor | None = None) -> Tensor:
        weights = good(layer, asking, states, prefix)
        return weights if prefix is None else weights + 1e-9 * torch.arange(weights.shape[1])

    monkeypatch.setattr(ratios.Layer, "log_weights", uneven)
    assert not ratios.prefix_here(0).holds
