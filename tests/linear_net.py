"""A purely linear network: a tiny Llama in float64 without norms, whose attention is even and whose MLPs are matrices.

Every analysis has an exact answer here. A prompt of T tokens gives each of them the weight 1 / T, so that with M_m the
MLP's matrix and A_m the heads' W_O W_V, block m maps the last token's stream h to (I + M_m)(I + A_m / T) h + constant.
"""

import torch
from torch import Tensor, nn

from taskvec.lm import LM
from tests import tiny


def linear_lm(*, seed: int = 0, mlp: Tensor | None = None, ov: float = 1.0, scale: float = 0.05) -> LM:
    """`mlp` is every block's M (drawn, where None); `ov` multiplies W_O."""
    torch.manual_seed(seed)
    model = tiny.build("llama").double()
    for block in model.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.self_attn.q_proj.weight.data.zero_()
        block.self_attn.q_proj.bias.data.zero_()
        for part in (block.self_attn.v_proj, block.self_attn.o_proj):
            nn.init.normal_(part.weight, std=0.3)
        block.self_attn.o_proj.weight.data *= ov
        block.mlp = nn.Linear(32, 32, bias=False).double()
        nn.init.normal_(block.mlp.weight, std=scale)
        if mlp is not None:
            block.mlp.weight.data.copy_(mlp)
    model.model.norm = nn.Identity()
    return LM(model, tiny.tokenizer(), name="linear")


def matrices(lm: LM, length: int) -> list[Tensor]:
    """Each block as a map of the last token's stream, in a prompt of this length."""
    out = list[Tensor]()
    for block in lm.model.model.layers:
        attention = block.self_attn
        values = attention.v_proj.weight.detach().reshape(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
        eye = torch.eye(32, dtype=torch.float64)
        head = eye + attention.o_proj.weight.detach() @ values / length
        out.append((eye + block.mlp.weight.detach()) @ head)
    return out


def product(maps: list[Tensor]) -> Tensor:
    """The first acts first."""
    out = torch.eye(32, dtype=torch.float64)
    for one in maps:
        out = one @ out
    return out
