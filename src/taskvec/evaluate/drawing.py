"""Few-shot prompts drawn from train, each with demonstrations of its own; and the mean head outputs behind them.

Shapes: L layers, J query heads of a layer, w width of a head, d width of the residual stream.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate.fitting import Fitting
from taskvec.lm import LM, Encoded
from taskvec.lm.encode import Answer
from taskvec.lm.structure import linear_part
from taskvec.prompts import Example
from taskvec.sites import Site
from taskvec.tasks import Split, Train


@dataclass(frozen=True)
class Drawn:
    """A query behind demonstrations of its own; `shuffled` ones have each other's outputs."""

    query: Example
    demos: tuple[Example, ...]


def draw(train: Train, n: int, *, seed: int, shuffled: bool = False) -> tuple[Drawn, ...]:
    """`n` prompts from train. Shuffled: the outputs of each prompt's demonstrations are permuted among them, so that
    they show the format and no longer the task (Todd et al., arXiv 2310.15213)."""
    rng = random.Random(f"drawn {seed} {shuffled}")
    out = []
    for _ in range(n):
        demos = train.demonstrations(seed=rng.getrandbits(32))
        query = rng.choice([example for example in train.examples if example not in demos])
        out.append(Drawn(query, _permuted(demos, rng) if shuffled else demos))
    return tuple(out)


def need_two_shots(train: Train, method: str) -> None:
    """Raise `InputError` where there is nothing to shuffle."""
    if train.spec.shots < 2:
        wanted = f"at least two shots, whose labels {method} shuffles"
        raise InputError(wanted, f"shots = {train.spec.shots}", "raise --shots")


def _permuted(demos: Sequence[Example], rng: random.Random) -> tuple[Example, ...]:
    """The same inputs under each other's outputs; not all under their own, unless all outputs are one."""
    own = [demo.output for demo in demos]
    outputs = list(own)
    while outputs == own and len(set(own)) > 1:
        rng.shuffle(outputs)
    return tuple(replace(demo, output=output) for demo, output in zip(demos, outputs, strict=True))


def encode_drawn(
    lm: LM, split: Split, drawn: Sequence[Drawn], *, bare: bool = False
) -> tuple[list[Encoded], list[Answer]]:
    """The prompts in tokens (`bare`: without their demonstrations), and their gold answers with the terminator."""
    format = split.spec.format
    prompts = [format.prompt(one.query.input, () if bare else one.demos) for one in drawn]
    golds = [
        lm.answer_ids(prompt, one.query.output, format, terminator=True)
        for prompt, one in zip(prompts, drawn, strict=True)
    ]
    return [lm.encode(prompt) for prompt in prompts], golds


def labels_read(drawn: Sequence[Drawn], *, queries: bool) -> set[str]:
    """The inputs whose outputs stand in the prompts; with `queries` also those asked for."""
    shown = {demo.input for one in drawn for demo in one.demos}
    return shown | ({one.query.input for one in drawn} if queries else set())


def head_sites(lm: LM) -> list[Site]:
    """`heads[l]` of every layer. Raises `MissingSite` for a model without them."""
    sites = [Site("heads", layer) for layer in range(lm.n_layers)]
    for site in sites:
        lm.point(site)
    return sites


def mean_heads(fitting: Fitting, prompts: Sequence[Encoded]) -> Float[Tensor, "L J w"]:
    """The mean over prompts of every head's output at the last token (the projection's input, split by head)."""
    sites = head_sites(fitting.lm)
    states = fitting.states_of(prompts, sites)
    return torch.stack([states[site].mean(0).reshape(fitting.lm.n_heads, -1) for site in sites])


def projected_heads(lm: LM, heads: Float[Tensor, "L J w"]) -> Float[Tensor, "L J d"]:
    """Each head's output as it enters the residual stream: W_O[:, slot j] z_j, without the projection's bias. Grouped
    queries and explicit head sizes need no case: J counts query heads, and the slot's width is the input's."""
    return torch.stack([project(lm, layer, one_slot_each(rows)) for layer, rows in enumerate(heads)])


def one_slot_each(rows: Float[Tensor, "J w"]) -> Float[Tensor, "J Jw"]:
    """Row j with its numbers in slot j and zeros in the other slots."""
    out: Tensor = torch.block_diag(*rows[:, None])  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def project(lm: LM, layer: int, z: Float[Tensor, "n w"]) -> Float[Tensor, "n d"]:
    """Rows through a layer's attention output projection, without its bias, on the CPU in float32."""
    module = lm.point(Site("heads", layer)).module
    weight = next(module.parameters())
    return linear_part(module, z.to(weight.device, lm.dtype)).float().cpu()
