"""Where a prompt's last token looks, head by head.

Shapes: L layers, J query heads of a layer, T tokens of a prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import ModelError
from taskvec.hooks import inject
from taskvec.lm import LM, Encoded
from taskvec.vector import TaskVector


@torch.no_grad()
def attention(lm: LM, prompts: Sequence[Encoded], vector: TaskVector | None) -> list[Float[Tensor, "L J _"]]:
    """The attention weights of each prompt's last token under a vector, (L, J, T). Raises `ModelError` for a family
    that does not hand them over."""
    out = list[Tensor]()
    with eager(lm), inject(lm, [vector]):
        for prompt in prompts:
            batch = lm.batch([prompt])
            with lm.announced(batch.prompts):
                found = lm.call(**lm.inputs(batch), use_cache=False, output_attentions=True).attentions
            if not found or any(layer is None for layer in found):
                raise ModelError(f"attention weights of {lm.id}", "none", "leave ov and heads out for this family")
            out.append(torch.stack([layer[0, :, -1].float().cpu() for layer in found]))
    return out


@contextmanager
def eager(lm: LM) -> Iterator[None]:
    """The model's plain attention, which hands its weights over; then the one it had. Raises `ModelError` for a family
    that has no other."""
    before = lm.config._attn_implementation
    try:
        lm.inner.set_attn_implementation("eager")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{lm.id} with plain attention", str(error), "leave ov and heads out") from None
    try:
        yield
    finally:
        lm.inner.set_attn_implementation(before)
