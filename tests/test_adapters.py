"""LoRA, prefix-tuning and prompt tuning against plain passes: merged weights, given caches, concatenated embeddings."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from taskvec import methods
from taskvec.errors import InputError, MissingPackage
from taskvec.evaluate import observe, score
from taskvec.evaluate.adapters import PeftAdapter
from taskvec.hooks import prove
from taskvec.lm import LM
from taskvec.methods.lora import LoRA
from taskvec.methods.prefix_tuning import PrefixTuning
from taskvec.methods.prompt_tuning import PromptTuning
from taskvec.prompts import Example
from taskvec.replay import packs
from taskvec.replay.stagger import staggers
from taskvec.tasks import Task
from tests import tiny
from tests.reference import answer, both_families, exact_lm, ids, label_task, open_task, prompt

Rival = LoRA | PrefixTuning | PromptTuning
Forward = Callable[[Sequence[int]], Tensor]
D, LAYERS, M = 32, 3, 4
SMALL: dict[str, Rival] = {
    "lora": LoRA(rank=4, steps=6, lr=0.02, batch=4, queries=8, n_dev=4),
    "prefix-tuning": PrefixTuning(length=M, steps=6, batch=4, queries=8, n_dev=4),
    "prompt-tuning": PromptTuning(length=M, steps=6, batch=4, queries=8, n_dev=4),
}
names = pytest.mark.parametrize("name", list(SMALL))


@cache
def fitted(name: str, family: str) -> PeftAdapter:
    task = open_task()
    return SMALL[name].fit(exact_lm(family), task.train, task.dev)


def of(method: Rival, lm: LM, task: Task | None = None, seed: int = 0) -> PeftAdapter:
    task = task or open_task()
    return method.fit(lm, task.train, task.dev, seed=seed)


# --- the reference: no taskvec in here --------------------------------------------------------------------------------


def only_weight(adapter: PeftAdapter) -> Tensor:
    (weight,) = adapter.weights.values()
    return weight.double()


def with_merged_weights(model: Any, adapter: PeftAdapter, scale: float) -> Forward:
    """A copy of the model whose weights are W + scale B A."""
    merged = deepcopy(model)
    modules = dict(merged.named_modules())
    downs = [name for name in adapter.weights if ".lora_A." in name]
    assert 2 * len(downs) == len(adapter.weights)
    for name in downs:
        down, up = adapter.weights[name], adapter.weights[name.replace(".lora_A.", ".lora_B.")]
        module = modules[name.removeprefix("base_model.model.").split(".lora_A.")[0]]
        change = scale * up @ down
        with torch.no_grad():  # GPT-2 keeps its weights the other way round
            module.weight += change if isinstance(module, nn.Linear) else change.T
    return lambda tokens: merged(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def behind_embeddings(model: Any, adapter: PeftAdapter) -> Forward:
    """The prompt's embeddings behind the soft ones; the logits of the prompt's own tokens."""
    soft = only_weight(adapter)

    def forward(tokens: Sequence[int]) -> Tensor:
        embeds = torch.cat([soft, model.get_input_embeddings()(torch.tensor(list(tokens)))])
        logits: Tensor = model(inputs_embeds=embeds[None], use_cache=False).logits[0, len(soft) :]
        return logits

    return forward


def behind_a_cache(model: Any, adapter: PeftAdapter) -> Forward:
    """The prompt behind given keys and values: row t of the weight holds, for every layer, token t's keys and values
    of all heads."""
    weight, width = only_weight(adapter), D // 4
    heads = weight.shape[1] // (2 * LAYERS * width)
    pairs = weight.reshape(M, LAYERS, 2, heads, width).permute(1, 2, 3, 0, 4)  # layer, key or value, head, token, width

    def forward(tokens: Sequence[int]) -> Tensor:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(pairs):
            cache.update(key[None], value[None], layer)
        inputs = {
            "input_ids": torch.tensor([list(tokens)]),
            "attention_mask": torch.ones(1, M + len(tokens), dtype=torch.long),
            "position_ids": torch.arange(M, M + len(tokens))[None],
        }
        logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True).logits[0]
        return logits

    return forward


def reference(name: str, model: Any, adapter: PeftAdapter) -> Forward:
    if name == "lora":
        return with_merged_weights(model, adapter, 16 / 4)  # alpha / rank
    return behind_embeddings(model, adapter) if name == "prompt-tuning" else behind_a_cache(model, adapter)


def bare(model: Any) -> Forward:
    return lambda tokens: model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


@torch.no_grad()
def mean_loss(forward: Forward, examples: Sequence[Example]) -> float:
    """Mean NLL per token of the whole answer and its terminator behind the zero-shot prompt."""
    losses = []
    for example in examples:
        head, tail = answer(example.input, f" {example.output}\n")
        losses.append(cross_entropy(forward(head + tail)[len(head) - 1 : -1].float(), torch.tensor(tail)))
    return float(torch.stack(losses).mean())


# --- the logits -------------------------------------------------------------------------------------------------------


@both_families
@names
def test_logits_are_those_of_the_plain_pass(name: str, family: str) -> None:
    """Prompts of several lengths in one batch: neither padding nor virtual tokens may move them."""
    lm, task = exact_lm(family), open_task()
    adapter = fitted(name, family)
    forward = reference(name, lm.model, adapter)
    with torch.no_grad():
        expected = torch.stack([forward(ids(prompt(example.input)))[-1] for example in task.dev.examples]).float()
    assert (observe(lm, task.dev).logits - expected).abs().max() > 0.1
    torch.testing.assert_close(observe(lm, task.dev, adapter).logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def greedy(lm: LM, forward: Forward, query: str) -> list[int]:
    """Five new tokens, each from a whole plain pass."""
    tokens = ids(query)
    for _ in range(5):
        tokens.append(int(forward(tokens)[-1].argmax()))
    return lm.before_end(tokens[-5:])


@both_families
@names
def test_generated_text_is_that_of_the_plain_pass_and_nothing_is_warned_of(name: str, family: str) -> None:
    lm = exact_lm(family)
    forward = reference(name, lm.model, fitted(name, family))
    with fitted(name, family).applied(lm):
        got = lm.generate_ids([prompt("walk12")], max_new_tokens=5)
    assert got == [greedy(lm, forward, prompt("walk12"))]
    assert got != lm.generate_ids([prompt("walk12")], max_new_tokens=5)


@both_families
@names
@pytest.mark.filterwarnings("ignore::UserWarning")  # that is the test above's; here only the tokens count
def test_generation_in_a_batch_is_that_of_each_prompt_alone(name: str, family: str) -> None:
    """Prompts of several lengths: padding stands between virtual tokens and a shorter prompt, and may not count."""
    lm = exact_lm(family)
    forward = reference(name, lm.model, fitted(name, family))
    queries = [prompt(example.input) for example in open_task().dev.examples]
    assert len({len(ids(query)) for query in queries}) > 1
    with fitted(name, family).applied(lm):
        assert lm.generate_ids(queries, max_new_tokens=5) == [greedy(lm, forward, query) for query in queries]


@names
def test_every_tokens_logits_come_back_and_no_virtual_ones(name: str) -> None:
    lm = exact_lm("llama")
    forward = reference(name, lm.model, fitted(name, "llama"))
    tokens = [ids(prompt(query)) for query in ("red1", "walk12")]
    batch = lm.batch([prompt("red1"), prompt("walk12")])
    with torch.no_grad(), fitted(name, "llama").applied(lm):
        got = lm.forward(batch)
    assert got.shape[1] == max(map(len, tokens))
    for row, one in zip(got, tokens, strict=True):
        torch.testing.assert_close(row[: len(one)], forward(one).detach(), atol=1e-5, rtol=1e-5)


# --- the start --------------------------------------------------------------------------------------------------------


@both_families
def test_lora_starts_as_the_identity(family: str) -> None:
    """B = 0: with a rate near 0 that is what comes out, and A is Kaiming's uniform."""
    lm, task = exact_lm(family), open_task()
    adapter = of(replace(LoRA(), lr=1e-30, steps=1, queries=2, n_dev=2), lm)
    for name, weight in adapter.weights.items():
        if "lora_B" in name:
            assert float(weight.abs().max()) < 1e-20
        else:
            bound = 1 / math.sqrt(weight.shape[1])  # sqrt(6 / ((1 + 5) fan_in))
            assert 0.9 * bound < float(weight.abs().max()) <= bound
    batch = lm.batch([prompt(example.input) for example in task.dev.examples])
    with torch.no_grad():
        before = lm.forward(batch)
        with adapter.applied(lm):
            torch.testing.assert_close(lm.forward(batch), before, atol=1e-12, rtol=0)


def test_soft_prompts_start_with_the_embeddings_spread_and_prefixes_with_init() -> None:
    lm = exact_lm("llama")
    spread = float(lm.model.get_input_embeddings().weight.detach().std())
    soft = only_weight(of(PromptTuning(length=40, lr=1e-30, steps=1, queries=2, n_dev=2), lm))
    assert float(soft.std()) == pytest.approx(spread, rel=0.1)
    prefix = only_weight(of(PrefixTuning(length=40, lr=1e-30, init=0.2, steps=1, queries=2, n_dev=2), lm))
    assert float(prefix.std()) == pytest.approx(0.2, rel=0.1)


@names
def test_the_seed_decides_the_start_and_the_global_generator_stays(name: str) -> None:
    lm, method = exact_lm("llama"), replace(SMALL[name], steps=1)
    state = torch.get_rng_state()
    one, two, other = (of(method, lm, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
    assert any(not torch.equal(one.weights[key], other.weights[key]) for key in one.weights)


# --- the parameters ---------------------------------------------------------------------------------------------------

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
}


def shapes(model: Any, chosen: Callable[[str], bool]) -> list[tuple[int, int]]:
    """The weights of the blocks' matrices with such a name (the norms are no matrices)."""
    return [
        (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if hasattr(module, "weight") and module.weight.dim() == 2 and "." in name and chosen(name.split(".")[-1])
    ]


@both_families
@pytest.mark.parametrize("rank", [1, 5])
def test_lora_has_rank_times_inputs_and_outputs_of_every_module(family: str, rank: int) -> None:
    lm = exact_lm(family)
    small = replace(LoRA(), rank=rank, steps=1, queries=2, n_dev=2)
    targets = TARGETS[family]
    named = of(replace(small, targets=targets), lm)
    expected = rank * sum(map(sum, shapes(lm.model, targets.__contains__)))
    assert len(shapes(lm.model, targets.__contains__)) == LAYERS * len(targets)
    assert named.parameters == named.origin.found["parameters"] == expected
    everything = of(small, lm)
    embeddings = ("embed_tokens", "wte", "wpe")
    every = shapes(lm.model, lambda name: name not in (*embeddings, "lm_head"))
    assert len(every) == LAYERS * (7 if family == "llama" else 4)
    assert everything.parameters == rank * sum(map(sum, every))


@pytest.mark.parametrize(("family", "kv"), [("llama", 16), ("gpt2", 32)])
@pytest.mark.parametrize("length", [1, 6])
def test_a_prefix_has_2_l_m_d_kv_numbers_and_a_soft_prompt_m_d(family: str, kv: int, length: int) -> None:
    lm = exact_lm(family)
    small: dict[str, Any] = {"length": length, "steps": 1, "queries": 2, "n_dev": 2}
    assert of(PrefixTuning(**small), lm).parameters == 2 * LAYERS * length * kv
    assert of(PromptTuning(**small), lm).parameters == length * D


def test_a_head_width_of_its_own_counts() -> None:
    """Qwen3's tiny heads are 20 wide, two of them for keys and values: not a part of the hidden size."""
    adapter = of(PrefixTuning(length=3, steps=1, queries=2, n_dev=2), exact_lm("qwen3"))
    assert adapter.parameters == 2 * LAYERS * 3 * 2 * 20


# --- what is left behind ----------------------------------------------------------------------------------------------


def picture(lm: LM) -> dict[str, Any]:
    """Everything about a model that an adapter could leave changed, weights aside."""
    return {
        "model": id(lm.model),
        "modules": [(name, id(module), type(module), module.training) for name, module in lm.model.named_modules()],
        "flags": {name: p.requires_grad for name, p in lm.model.named_parameters()},
        "grads": {name for name, p in lm.model.named_parameters() if p.grad is not None},
        "hooks": tiny.count_hooks(lm.model),
        "attributes": sorted(vars(lm.model)),
        "config": lm.model.config.to_dict(),
        "proofs": (id(lm.proofs), dict(lm.proofs)),
        "facts": (lm.fingerprint, lm.arguments, lm.inner is lm.model),
    }


def proved(family: str) -> LM:
    """A model of its own, proved, with some of its weights frozen beforehand."""
    lm = tiny.fresh_lm(family)
    prove(lm)
    if packs(lm) is None:
        staggers(lm)
    next(lm.model.parameters()).requires_grad = False
    return lm


def assert_as_before(lm: LM, before: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    after = picture(lm)
    for key, value in before.items():
        assert after[key] == value, key
    now = tiny.weights_of(lm.model)
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[key], weight) for key, weight in weights.items())


@both_families
@names
def test_the_model_is_as_before_after_fit_and_after_applied(name: str, family: str) -> None:
    lm = proved(family)
    task = open_task()
    first = of(SMALL[name], lm)  # what is proved of a model at a first fit stays known
    before, weights = picture(lm), tiny.weights_of(lm.model)
    adapter = of(SMALL[name], lm)
    assert_as_before(lm, before, weights)
    bare_logits = observe(lm, task.dev).logits
    assert (observe(lm, task.dev, adapter).logits - bare_logits).abs().max() > 1e-3
    assert_as_before(lm, before, weights)
    assert torch.equal(observe(lm, task.dev).logits, bare_logits)
    assert all(torch.equal(first.weights[key], adapter.weights[key]) for key in first.weights)


@both_families
@names
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_as_before_when_the_body_raises(name: str, family: str, error: type[BaseException]) -> None:
    lm = proved(family)
    adapter = of(SMALL[name], lm)
    before, weights = picture(lm), tiny.weights_of(lm.model)

    def body() -> None:
        with adapter.applied(lm):
            lm.forward(lm.batch(["red"]))
            raise error("no")

    with pytest.raises(error):
        body()
    assert_as_before(lm, before, weights)


@names
def test_the_model_is_as_before_when_training_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, task = proved("llama"), open_task()
    of(SMALL[name], lm)
    before, weights = picture(lm), tiny.weights_of(lm.model)

    def broken(logits: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    train = replace(task.train, spec=replace(task.spec, loss=broken))
    with pytest.raises(ZeroDivisionError):
        SMALL[name].fit(lm, train, task.dev)
    assert_as_before(lm, before, weights)


@names
def test_an_adapter_of_other_weights_leaves_the_model_as_before(name: str) -> None:
    lm = proved("llama")
    adapter = of(SMALL[name], lm)
    before, weights = picture(lm), tiny.weights_of(lm.model)
    broken = replace(adapter, weights={key: weight[:, :-1] for key, weight in adapter.weights.items()})
    with pytest.raises(RuntimeError), broken.applied(lm):
        pass
    assert_as_before(lm, before, weights)


def test_adapters_nest_in_nothing_and_follow_one_another() -> None:
    lm, task = proved("llama"), open_task()
    adapters = [of(SMALL[name], lm) for name in SMALL]
    alone = [observe(lm, task.dev, adapter).logits for adapter in adapters]
    for _ in range(2):
        for adapter, logits in zip(adapters, alone, strict=True):
            assert torch.equal(observe(lm, task.dev, adapter).logits, logits)


# --- training ---------------------------------------------------------------------------------------------------------


@both_families
@names
def test_training_lowers_the_loss_of_answers_it_has_not_seen(name: str, family: str) -> None:
    lm, task = exact_lm(family), label_task()
    rates = {"lora": 0.01, "prefix-tuning": 0.1, "prompt-tuning": 0.1}
    method = replace(SMALL[name], lr=rates[name], steps=40, batch=10, queries=20, n_dev=10, check=5)
    adapter = of(method, lm, task)
    before = mean_loss(bare(lm.model), task.test.examples)
    after = mean_loss(reference(name, lm.model, adapter), task.test.examples)
    assert after < 0.8 * before


@both_families
@names
def test_the_dev_loss_found_is_the_plain_passes(name: str, family: str) -> None:
    lm, dev = exact_lm(family), open_task().dev
    adapter = fitted(name, family)
    expected = mean_loss(reference(name, lm.model, adapter), dev.examples[:4])
    assert adapter.origin.found["dev_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_first_lora_step_follows_the_gradient_through_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient descent with rate 1: B moves from 0 to minus (alpha / rank) dL/dW A'."""
    lm, task = exact_lm("llama"), open_task()
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    method = LoRA(rank=2, alpha=6, targets=("down_proj",), lr=1.0, steps=1, batch=99, queries=5, n_dev=2)
    adapter = of(method, lm)
    copy = deepcopy(lm.model)
    losses = []
    for example in task.train.queries((), 5, seed=0):
        head, tail = answer(example.input, f" {example.output}\n")
        logits = bare(copy)(head + tail)
        losses.append(cross_entropy(logits[len(head) - 1 : -1].float(), torch.tensor(tail)))
    torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
    for layer, block in enumerate(copy.model.layers):
        key = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{{}}.default.weight"
        down, up = (adapter.weights[key.format(part)] for part in "AB")
        expected = -(6 / 2) * block.mlp.down_proj.weight.grad @ down.T
        assert expected.norm() > 1e-3
        torch.testing.assert_close(up, expected, atol=1e-5, rtol=1e-4)


@names
def test_the_best_look_at_dev_is_kept(name: str) -> None:
    """A rate that overshoots: runs of 1, 2, ... steps end where the looks of the long run stood."""
    lm = exact_lm("llama")
    method = replace(SMALL[name], lr=2.0, steps=6, check=1)
    adapter = of(method, lm)
    last = of(replace(method, check=99), lm)  # its only look is at the end
    one, two = adapter.origin.found["dev_loss"], last.origin.found["dev_loss"]
    assert isinstance(one, float)
    assert isinstance(two, float)
    assert one <= two
    expected = mean_loss(reference(name, lm.model, adapter), open_task().dev.examples[:4])
    assert one == pytest.approx(expected, rel=1e-4, abs=1e-3)


def lengths() -> list[int]:
    """Tokens of each training prompt with its answer."""
    examples = open_task().train.queries((), 8, seed=0)
    return [sum(map(len, answer(example.input, f" {example.output}\n"))) for example in examples]


@names
@pytest.mark.parametrize(("passes", "steps"), [(1.0, 1), (2.2, 2), (2.7, 2), (4.0, 4), (50.0, 6)])
def test_the_token_bound_limits_the_steps(name: str, passes: float, steps: int) -> None:
    """Every step takes all eight prompts, so that what it costs is known: `tokens` in all are the most."""
    method = replace(SMALL[name], batch=8, tokens=int(passes * sum(lengths())))
    assert of(method, exact_lm("llama")).origin.found["steps"] == steps


@names
def test_one_step_is_taken_however_few_the_tokens(name: str) -> None:
    assert of(replace(SMALL[name], tokens=1), exact_lm("llama")).origin.found["steps"] == 1


@names
def test_it_reads_its_training_examples_and_dev_and_nothing_more(name: str) -> None:
    lm, task = exact_lm("llama"), open_task()
    used = set(task.train.queries((), 8, seed=0))
    hidden = tuple(e if e in used else replace(e, output="red") for e in task.train.examples)
    train = replace(task.train, examples=hidden)
    one, two = fitted(name, "llama"), SMALL[name].fit(lm, train, task.dev)
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
    assert one.origin.cost.labels == len({e.input for e in used}) + 4
    assert one.origin.cost.queries == 0


# --- scores -----------------------------------------------------------------------------------------------------------


@names
def test_it_is_scored_beside_few_shot(name: str) -> None:
    lm, task = exact_lm("llama"), label_task()
    adapter = of(SMALL[name], lm, task)
    row = score(lm, task.dev, adapter).rows[0]
    assert row.method == name
    assert row.label_accuracy is not None
    assert row.d_ntp_full is not None
    virtual = M if name == "prompt-tuning" else 0
    assert row.computed_tokens == pytest.approx(row.prompt_tokens + virtual)


# --- what is refused --------------------------------------------------------------------------------------------------


@names
def test_without_peft_one_line_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = proved("llama")
    before, weights = picture(lm), tiny.weights_of(lm.model)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackage, match="run: pip install peft") as caught:
        of(SMALL[name], lm)
    assert "\n" not in str(caught.value)
    assert_as_before(lm, before, weights)


@pytest.mark.parametrize("targets", [("nothing",), ("q_proj", "nothing"), ("norm",), ()])
def test_lora_targets_that_are_not_there_or_do_not_fit_are_refused(targets: tuple[str, ...]) -> None:
    lm = proved("llama")
    of(SMALL["lora"], lm)
    before, weights = picture(lm), tiny.weights_of(lm.model)
    with pytest.raises(InputError, match=r"lora\.targets") as caught:
        of(replace(LoRA(), targets=targets, steps=1, queries=2), lm)
    assert "\n" not in str(caught.value)
    assert_as_before(lm, before, weights)


@names
@pytest.mark.parametrize("field", ["steps", "batch", "tokens", "queries", "check", "n_dev"])
def test_numbers_of_things_below_one_are_refused(name: str, field: str) -> None:
    with pytest.raises(InputError, match=rf"{name}\.{field} of at least 1; found 0"):
        methods.make(name, {field: "0"}).fit(exact_lm("llama"), open_task().train, open_task().dev)


@pytest.mark.parametrize(
    ("name", "field"), [("lora", "rank"), ("prefix-tuning", "length"), ("prompt-tuning", "length")]
)
def test_a_size_below_one_is_refused(name: str, field: str) -> None:
    with pytest.raises(InputError, match=rf"{name}\.{field} of at least 1; found 0"):
        methods.make(name, {field: "0"}).fit(exact_lm("llama"), open_task().train, open_task().dev)


@names
def test_a_rate_without_a_finite_dev_loss_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="no finite dev loss"):
        of(replace(SMALL[name], lr=float("inf"), steps=2), exact_lm("llama"))


@pytest.mark.parametrize("targets", [("q_proj", "input_layernorm"), ("q_proj", "mlp"), ("nowhere",)])
@pytest.mark.parametrize("checked", [True, False])
def test_a_refused_lora_leaves_the_model_as_it_was(
    targets: tuple[str, ...], checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where peft itself gives up half-way."""
    lm, task = tiny.fresh_lm("llama"), open_task()
    before = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    modules = [name for name, _ in lm.model.named_modules()]
    if not checked:
        monkeypatch.setattr(LoRA, "_check", lambda *_: None)
    with pytest.raises(InputError, match=r"lora\.targets"), lm.metered() as meter:
        LoRA(targets=targets).fit(lm, task.train, task.dev)
    assert meter.passes == 0 or not checked
    assert {name: p.requires_grad for name, p in lm.model.named_parameters()} == before
    assert [name for name, _ in lm.model.named_modules()] == modules
    assert not hasattr(lm.model, "peft_config")


@pytest.mark.parametrize("name", ["lora", "prefix-tuning", "prompt-tuning"])
@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_not_above_zero_is_refused_before_any_pass(name: str, lr: float) -> None:
    lm, task = exact_lm("llama"), open_task()
    with pytest.raises(InputError, match=rf"{name}\.lr above 0"), lm.metered() as meter:
        replace(SMALL[name], lr=lr).fit(lm, task.train, task.dev)
    assert meter.passes == 0


def test_an_adapter_without_weight_is_refused() -> None:
    with pytest.raises(InputError, match=r"lora\.alpha above 0"):
        LoRA(alpha=0).fit(exact_lm("llama"), open_task().train, open_task().dev)
