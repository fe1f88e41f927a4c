"""Finding the parts of a transformer by its structure. Names of modules are data in this file, and only here.

What is found here is proved at first use (`hooks.prove`): each site must move the logits, and `attn` and `mlp` must add
up to what a block does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taskvec.errors import MissingSite

# Attribute names of a block's parts over the families of transformers; the first that is there counts.
ATTENTION = ("self_attn", "attn", "attention", "self_attention", "norm_attn_norm")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "fc2")
OUT_PROJECTION = ("o_proj", "c_proj", "out_proj", "dense", "wo", "Wo")
# Families whose sub-layers end with a norm of their own before the residual: (after attention, after MLP).
POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder block and its parts: what is added by attention and MLP, and the attention's output projection."""

    module: nn.Module
    attn: nn.Module | None
    mlp: nn.Module | None
    out_projection: nn.Module | None
    head_width: int | None


def find_blocks(model: nn.Module, n_layers: int, n_heads: int) -> tuple[Block, ...]:
    """The decoder blocks: the one list of `n_layers` modules that have attention. Raises `MissingSite` if there is
    none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    lists = [m for m in lists if any(child(block, ATTENTION) is not None for block in m)]
    if len(lists) != 1:
        raise MissingSite(
            f"one list of {n_layers} decoder blocks with attention in {type(model).__name__}",
            f"{len(lists)} such lists",
            "use a decoder-only transformer of the Hugging Face library",
        )
    return tuple(_block(module, n_heads) for module in lists[0])


def child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first child module with one of these names."""
    return next((m for name in names if isinstance(m := getattr(module, name, None), nn.Module)), None)


def in_width(projection: nn.Module) -> int:
    """The input width of a linear module: plain, Conv1D, quantised or LoRA-wrapped."""
    for name in ("in_features", "nx"):
        if isinstance(width := getattr(projection, name, None), int):
            return width
    return _weight(projection).shape[-1]


def out_width(projection: nn.Module) -> int:
    """The output width of a linear module: plain, Conv1D, quantised or LoRA-wrapped."""
    for name in ("out_features", "nf"):
        if isinstance(width := getattr(projection, name, None), int):
            return width
    return _weight(projection).shape[0]


def _weight(projection: nn.Module) -> Tensor:
    weight = projection.weight
    assert isinstance(weight, Tensor)
    return weight


def _block(module: nn.Module, n_heads: int) -> Block:
    attention, mlp = child(module, ATTENTION), child(module, MLP)
    out = child(attention, OUT_PROJECTION) if attention is not None else None
    head_width = in_width(out) // n_heads if out is not None else None
    for after_attention, after_mlp in POST_NORMS:
        if hasattr(module, after_attention) and hasattr(module, after_mlp):
            attention, mlp = getattr(module, after_attention), getattr(module, after_mlp)
    return Block(module, attention, mlp, out, head_width)


def linear_part(module: nn.Module, x: Tensor) -> Tensor:
    """What an affine module (plain, Conv1D, quantised, LoRA-wrapped) does to rows `x`, without its bias."""
    out: Tensor = module(x) - module(torch.zeros_like(x[:1]))
    return out
