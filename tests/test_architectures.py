"""Every family: sites found and proved, captures against transformers' own, edits against a hand-written hook."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taskvec.errors import MissingSite
from taskvec.hooks import capture, inject, prove
from taskvec.lm import LM, Batch
from taskvec.replay import Ask, Trial, replay
from taskvec.sites import Site
from taskvec.vector import Add, Edit, TaskVector
from tests import tiny

every_family = pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
main_families = pytest.mark.parametrize("name", tiny.MAIN)
additive_families = pytest.mark.parametrize("name", tiny.ADDITIVE)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with tiny.one_thread():
        yield


def _batch(lm: LM, side: Any = "right") -> Batch:
    return lm.batch(tiny.random_prompts((24, 19, 7)), side=side)


def _real(batch: Batch) -> Tensor:
    return batch.mask.bool()


def _module_lists(model: nn.Module, length: int) -> list[nn.ModuleList]:
    """Lists of that many modules which are not inside another such list: the blocks, found without taskvec."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == length]
    return [m for name, m in found if not any(name.startswith(other + ".") for other, _ in found if other != name)]


@contextmanager
def _plain_hook(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The independent reference: a forward hook on a block, whatever its output looks like."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- what is there ---------------------------------------------------------------------------------------------------


@main_families
def test_all_sites_are_found_and_each_moves_the_logits(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prove(lm)
    layered = [f"{kind}[{layer}]" for layer in range(lm.n_layers) for kind in ("resid", "attn", "mlp", "heads")]
    assert [str(site) for site in lm.sites()] == ["embed", *layered, "lm_head_in"]
    assert lm.proofs["sites"] == {}


@every_family
def test_layers_and_heads_are_counted_from_the_configuration(name: str) -> None:
    lm = tiny.tiny_lm(name)
    config = lm.model.config
    layers = getattr(config, "num_hidden_layers", None) or config.n_layers
    assert lm.n_layers == layers >= 3
    (blocks,) = _module_lists(lm.model, lm.n_layers)
    assert [block.module for block in lm.blocks] == list(blocks)
    assert lm.n_heads == config.num_attention_heads == 4


@every_family
def test_width_is_the_width_that_is_captured(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prove(lm)
    sites = [site for site in lm.sites() if site not in lm.proofs["sites"]]
    sites += [Site("heads", site.layer, head) for site in sites if site.kind == "heads" for head in (0, lm.n_heads - 1)]
    with torch.no_grad(), capture(lm, sites) as seen:
        lm.forward(_batch(lm))
    assert {str(s): tuple(seen[s].shape) for s in sites} == {str(s): (3, 24, lm.width(s)) for s in sites}
    assert lm.width(Site("resid", 0)) == lm.width(Site("embed")) == lm.model.config.hidden_size


def test_explicit_head_sizes_are_read_from_the_weights() -> None:
    widths = {name: tiny.tiny_lm(name).width(Site("heads", 0)) for name in ("qwen3", "gemma3", "qwen3_moe", "mistral")}
    assert widths == {"qwen3": 80, "gemma3": 48, "qwen3_moe": 48, "mistral": 48}
    assert tiny.tiny_lm("qwen3").width(Site("heads", 0, 3)) == 20
    assert tiny.tiny_lm("qwen3").width(Site("resid", 0)) == 32


@every_family
def test_a_layer_or_head_beyond_the_last_is_a_missing_site(name: str) -> None:
    lm = tiny.tiny_lm(name)
    with pytest.raises(MissingSite, match="a layer from 0 to"):
        lm.width(Site("resid", lm.n_layers))
    with pytest.raises(MissingSite, match="a head from 0 to 3"), capture(lm, ["heads[0,4]"]):
        pass


# --- what is read ----------------------------------------------------------------------------------------------------


@additive_families
def test_a_block_adds_its_attention_and_its_mlp(name: str) -> None:
    lm = tiny.tiny_lm(name)
    kinds = ("resid", "attn", "mlp")
    sites = [f"{kind}[{layer}]" for layer in range(lm.n_layers) for kind in kinds]
    batch = _batch(lm)
    with torch.no_grad(), capture(lm, ["embed", *sites]) as seen:
        lm.forward(batch)
    before = seen["embed"]
    for layer in range(lm.n_layers):
        attn, mlp, after = (seen[f"{kind}[{layer}]"] for kind in ("attn", "mlp", "resid"))
        torch.testing.assert_close((before + attn + mlp)[_real(batch)], after[_real(batch)], atol=1e-4, rtol=1e-4)
        assert attn[_real(batch)].norm() > 1e-2 < mlp[_real(batch)].norm()
        before = after


@every_family
def test_captured_states_are_those_of_output_hidden_states(name: str) -> None:
    lm = tiny.tiny_lm(name)
    batch = _batch(lm)
    sites = ["embed", *(f"resid[{layer}]" for layer in range(lm.n_layers)), "lm_head_in"]
    with torch.no_grad(), capture(lm, sites) as seen:
        lm.forward(batch)
    with torch.no_grad():
        theirs = lm.model(**lm.inputs(batch), output_hidden_states=True, use_cache=False).hidden_states
    ours = [seen[site] for site in sites if site != f"resid[{lm.n_layers - 1}]"]
    assert len(theirs) == len(ours) == lm.n_layers + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a[_real(batch)], b[_real(batch)], atol=1e-6, rtol=1e-5)


@every_family
def test_lm_head_in_is_what_the_unembedding_reads(name: str) -> None:
    lm = tiny.tiny_lm(name)
    batch = _batch(lm)
    with torch.no_grad(), capture(lm, ["lm_head_in", f"resid[{lm.n_layers - 1}]"]) as seen:
        logits = lm.forward(batch)
        mine = lm.model.get_output_embeddings()(seen["lm_head_in"])
    scaling, cap = getattr(lm.config, "logits_scaling", 1.0), getattr(lm.config, "final_logit_softcapping", None)
    mine = mine / scaling if cap is None else cap * torch.tanh(mine / cap)
    torch.testing.assert_close(mine[_real(batch)], logits[_real(batch)], atol=1e-5, rtol=1e-5)
    gap = (seen["lm_head_in"] - seen[f"resid[{lm.n_layers - 1}]"])[_real(batch)]
    assert gap.abs().max() > 0.1  # the final norm is in between


@every_family
def test_heads_side_by_side_are_the_input_of_the_output_projection(name: str) -> None:
    lm = tiny.tiny_lm(name)
    if lm.blocks[0].out_projection is None:
        with pytest.raises(MissingSite, match="no such part"), capture(lm, ["heads[0]"]):
            pass
        return
    layer = lm.n_layers - 1
    parts = [f"heads[{layer},{head}]" for head in range(lm.n_heads)]
    with torch.no_grad(), capture(lm, [f"heads[{layer}]", *parts]) as seen:
        lm.forward(_batch(lm))
    assert torch.equal(torch.cat([seen[part] for part in parts], dim=-1), seen[f"heads[{layer}]"])
    assert len({lm.width(Site.parse(part)) for part in parts}) == 1


# --- what is changed -------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_add_at_resid_equals_a_hand_written_hook(name: str, side: str) -> None:
    lm = tiny.tiny_lm(name)
    batch = _batch(lm, side)
    (blocks,) = _module_lists(lm.model, lm.n_layers)
    last = [int(row.nonzero()[-1]) for row in batch.mask]
    for layer in range(lm.n_layers):
        v = tiny.random_vector(lm.width(Site("resid", layer)), layer)
        where = torch.zeros(batch.mask.shape).index_put((torch.arange(3), torch.tensor(last)), torch.tensor(1.0))
        shift = where[..., None] * v
        with torch.no_grad():
            bare = lm.forward(batch)
            with _plain_hook(blocks[layer], partial(torch.add, shift)):
                expected = lm.forward(batch)
            with inject(lm, TaskVector((Edit(Site("resid", layer), Add(v)),))):
                got = lm.forward(batch)
        torch.testing.assert_close(got[_real(batch)], expected[_real(batch)], atol=1e-6, rtol=1e-5)
        rows = torch.arange(3)
        assert (got - bare)[rows, last].abs().amax(-1).min() > 1e-2
        before = _real(batch) & (where == 0)
        assert torch.equal(got[before], bare[before])


@every_family
@pytest.mark.parametrize("kind", ["embed", "attn", "mlp", "heads", "head", "lm_head_in"])
def test_an_edit_at_each_kind_of_site_is_seen_there_and_nowhere_before(name: str, kind: str) -> None:
    lm = tiny.tiny_lm(name)
    prove(lm)
    layered = {"attn": "attn[1]", "mlp": "mlp[1]", "heads": "heads[1]", "head": "heads[1,2]"}
    site = Site.parse(layered.get(kind, kind))
    if site.whole in lm.proofs["sites"] or site.whole not in lm.sites():
        with pytest.raises(MissingSite), inject(lm, TaskVector((Edit(site, Add(torch.ones(4))),))):
            pass
        return
    v = tiny.random_vector(lm.width(site), 5)
    batch = _batch(lm)
    watched = [site.whole, Site("embed"), Site("resid", 0), Site("resid", 1)]
    with torch.no_grad():
        with capture(lm, watched) as clean:
            logits = lm.forward(batch)
        with inject(lm, TaskVector((Edit(site, Add(v)),))), capture(lm, watched) as dirty:
            moved = lm.forward(batch)
    rows, last = torch.arange(3), batch.last
    change = (dirty[site.whole] - clean[site.whole])[rows, last]
    expected = torch.zeros_like(change)
    start = (site.head or 0) * len(v)
    expected[:, start : start + len(v)] = v
    torch.testing.assert_close(change, expected.expand(3, -1), atol=1e-5, rtol=1e-5)
    assert (moved - logits)[rows, last].abs().amax(-1).min() > 1e-3
    untouched = {"embed": [], "lm_head_in": watched[1:]}.get(kind, watched[1:3])
    assert all(torch.equal(clean[s], dirty[s]) for s in untouched)


@every_family
def test_nothing_about_the_model_changes(name: str) -> None:
    lm = tiny.tiny_lm(name)
    prove(lm)
    weights, hooks, state = tiny.weights_of(lm.model), tiny.count_hooks(lm.model), torch.random.get_rng_state()
    grads = [p.requires_grad for p in lm.model.parameters()]
    vector = TaskVector((Edit(Site("resid", 1), Add(tiny.random_vector(lm.width(Site("resid", 1)), 1))),))
    prompts = tiny.random_prompts((9, 6))
    with torch.no_grad(), inject(lm, vector), capture(lm, ["resid[2]"]):
        lm.forward(lm.batch(prompts))
        lm.generate_ids(prompts, max_new_tokens=2)
    ask = Ask(keep=lambda _, row: row, labels=((5, 6), (7,)), max_new=2, states=(Site("resid", 2),))
    replay(lm, prompts).answer([Trial(0, vector), Trial(1)], ask)
    assert all(torch.equal(weights[key], tensor) for key, tensor in lm.model.state_dict().items())
    assert tiny.count_hooks(lm.model) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [p.requires_grad for p in lm.model.parameters()] == grads
    assert all(p.grad is None for p in lm.model.parameters())
    assert not lm.model.training
    assert lm.running is None


@every_family
def test_proving_a_model_leaves_the_global_generator_and_its_hooks_alone(name: str) -> None:
    lm = tiny.fresh_lm(name)
    state, hooks = torch.random.get_rng_state(), tiny.count_hooks(lm.model)
    prove(lm)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tiny.count_hooks(lm.model) == hooks


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "mpt", "granite"])
@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_a_part_that_is_not_what_its_name_says_is_refused(name: str, kind: str) -> None:
    lm = tiny.tiny_lm(name)
    with pytest.raises(MissingSite, match="not what the block adds"), capture(lm, [f"{kind}[1]"]):
        pass
    vector = TaskVector((Edit(Site.parse(f"{kind}[1]"), Add(torch.ones(32))),))
    with pytest.raises(MissingSite, match="not what the block adds"), inject(lm, vector):
        pass


def test_a_site_that_moves_nothing_is_refused() -> None:
    lm = tiny.fresh_lm("llama")
    with torch.no_grad():
        lm.blocks[1].out_projection.weight.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(MissingSite, match="does not move the logits"), capture(lm, ["heads[1,0]"]):
        pass
    assert list(lm.proofs["sites"]) == [Site("heads", 1)]


def test_a_model_without_a_single_list_of_blocks_is_refused() -> None:
    model = tiny.build("llama")
    model.more = nn.ModuleList(model.model.layers)
    with pytest.raises(MissingSite, match="one list of 3 decoder blocks"):
        LM(model)
