"""What the methods' tests are held against: plain loops over single prompts, plain transformers, hooks of this file's
own. From `ids` on nothing here knows taskvec's engine, hooks or methods."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from taskvec.lm import LM
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.tasks import Dev, Task
from tests import tiny

HEAD_IN = Site("lm_head_in")
both_families = pytest.mark.parametrize("family", ["llama", "gpt2"])


@cache
def exact_lm(family: str) -> LM:
    """A tiny model in float64: what is left of a difference is the vectors' own float32."""
    return LM(tiny.build(family).double(), tiny.tokenizer(), name=f"exact-{family}")


@cache
def open_task() -> Task:
    return tiny.tiny_task(shots=3)


@cache
def telling_task() -> Task:
    """Its answers begin with different tokens."""
    return tiny.tiny_task(shots=3, format="{input} ->{output}\n")


@cache
def label_task() -> Task:
    return tiny.tiny_task(shots=3, labels=True)


# --- the reference: no taskvec in here --------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(tiny.tokenizer()(text)["input_ids"])


def prompt(query: str, demos: Sequence[Example] = ()) -> str:
    return "".join(f"{demo.input} -> {demo.output}\n" for demo in demos) + f"{query} ->"


def answer(query: str, text: str, demos: Sequence[Example] = ()) -> tuple[list[int], list[int]]:
    """(the prompt's tokens, those of the text behind it)."""
    head, whole = ids(prompt(query, demos)), ids(prompt(query, demos) + text)
    assert whole[: len(head)] == head
    return head, whole[len(head) :]


def blocks(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


@dataclass(frozen=True)
class Run:
    """One prompt's logits (T, V), block outputs (T, d) by layer, and the input of the unembedding (T, d)."""

    logits: Tensor
    resid: tuple[Tensor, ...]
    head_in: Tensor


def run(model: Any, tokens: Sequence[int], change: Mapping[int, Callable[[Tensor], Tensor]] | None = None) -> Run:
    """The whole prompt, once. `change[l]` maps block l's output (T, d) to another."""
    seen: dict[int, Tensor] = {}
    heads: list[Tensor] = []

    def after(layer: int) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            h = change[layer](h[0])[None] if change and layer in change else h
            seen[layer] = h[0]
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return hook

    handles = [block.register_forward_hook(after(layer)) for layer, block in enumerate(blocks(model))]
    handles.append(model.lm_head.register_forward_pre_hook(lambda _, args: heads.append(args[0][0])))
    try:
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Run(logits, tuple(seen[layer] for layer in range(len(seen))), heads[0])


def put(at: int, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Token `at` replaced."""
    return lambda h: torch.cat([h[:at], value[None].to(h), h[at + 1 :]])


def plus(at: int, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Token `at` moved."""
    return lambda h: torch.cat([h[:at], (h[at] + value.to(h))[None], h[at + 1 :]])


@torch.no_grad()
def pairs(model: Any, queries: Sequence[Example], demos: Sequence[Example]) -> tuple[list[Run], list[Run]]:
    """Each query's zero-shot and few-shot run."""
    return (
        [run(model, ids(prompt(q.input))) for q in queries],
        [run(model, ids(prompt(q.input, demos))) for q in queries],
    )


def head_states(runs: Sequence[Run]) -> Tensor:
    return torch.stack([r.head_in[-1] for r in runs]).double()


@torch.no_grad()
def best_of(model: Any, dev: Dev, limit: int, changed: Callable[[int, list[int], int], Tensor], n: int) -> list[Any]:
    """(label accuracy, mean log-probability of the first gold token) of n candidates on `limit` dev items.

    `changed(c, tokens, at)` are candidate c's logits (T, V) of `tokens`, edited at token `at`.
    """
    out = []
    for c in range(n):
        hits, golds = 0, 0.0
        for example in dev.examples[:limit]:
            scores = {}
            for label in dev.spec.labels or ():
                head, tail = answer(example.input, f" {label}")
                logs = changed(c, head + tail, len(head) - 1).log_softmax(-1)
                scores[label] = sum(float(logs[len(head) - 1 + k, token]) for k, token in enumerate(tail))
                if label == example.output:
                    golds += float(logs[len(head) - 1, tail[0]])
            hits += max(scores, key=lambda label: scores[label]) == example.output
        out.append((hits / limit, golds / limit))
    return out
