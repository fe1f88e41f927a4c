"""E1: for one input, vectors at the last token give the logits of any LoRA, or of any other change of the model.

    v_l = (h_LoRA[l] - block_l(h_edited[l-1])) / strength at the last token, layer by layer

On a random GPT-2 of three blocks in float64, with this library's own `inject` and `capture`: what is proved is the
code that the vectors run on. Errors are shares of the change's own effect on the logits, the largest over the
vocabulary. Nothing here is about rank: `any_change` is E1 without a LoRA. The changed weights must lie below the last
vector's site: a change of the final norm or the unembedding is out of its reach.

Shapes: d width, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.hooks import capture, inject
from taskvec.lm import LM, Encoded
from taskvec.sites import Site
from taskvec.theory.statement import EXACT, Theorem, generator, normal
from taskvec.vector import Add, Edit, TaskVector, Where

STRENGTH = 1e-3
"""The paper's constant."""
MOVES = 0.01
"""The least share of the change's effect that counts as a difference."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model, the same one changed by a LoRA or in all weights of its blocks, and a prompt."""

    base: LM
    lora: LM
    other: LM
    prompt: Encoded


@lru_cache(maxsize=1)
def setting(seed: int) -> Setting:
    """Eight tokens, three blocks, rank 2 on queries, keys and values of each."""
    source = generator(seed)
    base = _model(source)
    ids = torch.randint(base.config.vocab_size, (8,), generator=source).tolist()
    changed = (_lm(base, "base"), _lm(_with_lora(base, source), "lora"), _lm(_with_noise(base, source), "other"))
    return Setting(*changed, Encoded(tuple(ids)))


def _lm(model: Any, name: str) -> LM:
    return LM(model, name=f"theory-{name}")


def _model(source: torch.Generator) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=32, **ends)
    with torch.random.fork_rng(devices=[]):  # the constructor draws first weights from the global generator
        model = GPT2LMHeadModel(config).double()
    for weight in model.parameters():
        about = 1.0 if weight.dim() == 1 and bool((weight == 1).all()) else 0.0
        weight.data = about + 0.2 * normal(source, *weight.shape)
    return model


def _with_lora(base: Any, source: torch.Generator) -> Any:
    model = copy.deepcopy(base)
    for block in model.transformer.h:
        weight = block.attn.c_attn.weight  # (in, out)
        weight.data += 0.2 * normal(source, weight.shape[0], 2) @ normal(source, 2, weight.shape[1])
    return model


def _with_noise(base: Any, source: torch.Generator) -> Any:
    model = copy.deepcopy(base)
    for weight in model.transformer.h.parameters():
        weight.data += 0.05 * normal(source, *weight.shape)
    return model


# --- vectors ---------------------------------------------------------------------------------------------------------


def _vector(rows: Sequence[Tensor], layers: Sequence[int], where: str) -> TaskVector:
    edits = [
        Edit(Site("resid", layer), Add(row), Where.parse(where), STRENGTH)
        for layer, row in zip(layers, rows, strict=True)
    ]
    return TaskVector(tuple(edits))


@torch.no_grad()
def run(lm: LM, prompt: Encoded, vector: TaskVector) -> tuple[list[Float[Tensor, " d"]], Float[Tensor, " V"]]:
    """The last token's states behind each block, and its logits, with a vector injected."""
    sites = [Site("resid", layer) for layer in range(lm.n_layers)]
    with inject(lm, vector), capture(lm, sites) as seen:
        logits = lm.forward(lm.batch([prompt]))[0, -1]
    return [seen[site][0, -1] for site in sites], logits


def per_layer(base: LM, changed: LM, prompt: Encoded) -> list[Float[Tensor, " d"]]:
    """The vectors of the formula above, one a layer: each is found with all earlier ones injected."""
    wanted, _ = run(changed, prompt, TaskVector(()))
    rows = list[Tensor]()
    for layer in range(base.n_layers):
        reached, _ = run(base, prompt, _vector(rows, range(layer), "last_prompt"))
        rows.append((wanted[layer] - reached[layer]) / STRENGTH)
    return rows


def share(base: LM, changed: LM, prompt: Encoded, vector: TaskVector) -> float:
    """How far a vector's logits are from the changed model's, over how far the bare model's are."""
    (_, bare), (_, wanted), (_, got) = (
        run(lm, prompt, v) for lm, v in ((base, TaskVector(())), (changed, TaskVector(())), (base, vector))
    )
    return float((got - wanted).abs().max() / (bare - wanted).abs().max())


# --- statements ------------------------------------------------------------------------------------------------------


def lora_matters(seed: int = 0) -> Theorem:
    """E1 would be empty if the LoRA did nothing."""
    s = setting(seed)
    (_, bare), (_, wanted) = (run(lm, s.prompt, TaskVector(())) for lm in (s.base, s.lora))
    says = "The LoRA that is imitated moves the logits."
    return Theorem("E1 effect", says, "at least", 0.1, float((bare - wanted).abs().max()), 0.0)


def every_layer(seed: int = 0) -> Theorem:
    """One vector a layer, at the last token."""
    s = setting(seed)
    rows = per_layer(s.base, s.lora, s.prompt)
    error = share(s.base, s.lora, s.prompt, _vector(rows, range(len(rows)), "last_prompt"))
    says = "For one input, one vector a layer at the last token gives a LoRA's logits."
    return Theorem("E1 every layer", says, "equal", 0.0, error, EXACT)


def last_layer(seed: int = 0) -> Theorem:
    """The last layer's vector alone."""
    s = setting(seed)
    (wanted, _), (bare, _) = (run(lm, s.prompt, TaskVector(())) for lm in (s.lora, s.base))
    vector = _vector([(wanted[-1] - bare[-1]) / STRENGTH], [s.base.n_layers - 1], "last_prompt")
    says = "For one input, the last layer's vector alone gives a LoRA's logits, too."
    return Theorem("E1 last layer", says, "equal", 0.0, share(s.base, s.lora, s.prompt, vector), EXACT)


def any_change(seed: int = 0) -> Theorem:
    """The same for a model all of whose blocks' weights were changed, at full rank."""
    s = setting(seed)
    rows = per_layer(s.base, s.other, s.prompt)
    error = share(s.base, s.other, s.prompt, _vector(rows, range(len(rows)), "last_prompt"))
    says = "Vectors also give the logits of a full-rank change of all blocks: E1 is no evidence of equal rank."
    return Theorem("E1 any change", says, "equal", 0.0, error, EXACT)


def broadcast(seed: int = 0) -> Theorem:
    """The vectors of `every_layer`, at every token."""
    s = setting(seed)
    rows = per_layer(s.base, s.lora, s.prompt)
    error = share(s.base, s.lora, s.prompt, _vector(rows, range(len(rows)), "all"))
    says = "A LoRA's vectors at all tokens do not give its logits: the last token then reads other keys and values."
    return Theorem("E1 broadcast", says, "at least", MOVES, error, 0.0)


STATEMENTS: tuple[Callable[[int], Theorem], ...] = (lora_matters, every_layer, last_layer, any_change, broadcast)
