"""How far two next-token distributions and the states behind them lie apart.

Shapes: n queries, V vocabulary, C tokens of the support, d width of the residual stream.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def kl(reference: Float[Tensor, "n V"], logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """KL(reference || this) of each row, in nats: d_ntp_full is its mean. Finite for any finite logits."""
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0.0)


def d_ntp(reference: Float[Tensor, "n V"], logits: Float[Tensor, "n V"], support: Sequence[int]) -> Float[Tensor, " n"]:
    """KL(few-shot || this) over the support's tokens, renormalised, per query (Linear TV, arXiv 2605.20730, section 4).

    The paper's d_NTP is the mean over queries, with the labels' first tokens as support. The direction is forward:
    few-shot is the reference. Computed in float32 whatever the model's dtype.
    """
    columns = torch.tensor(list(support))
    return kl(reference[:, columns], logits[:, columns])


def label_logit_error(
    reference: Float[Tensor, "n V"], logits: Float[Tensor, "n V"], support: Sequence[int]
) -> Float[Tensor, " n"]:
    """||D||^2 with D the difference of the support's logits, centred in each row (softmax does not see its mean).

    d_NTP is at most a quarter of it: KL is the Bregman divergence of log-sum-exp, whose Hessian is at most 1/2.
    """
    columns = torch.tensor(list(support))
    apart = reference.float()[:, columns] - logits.float()[:, columns]
    return (apart - apart.mean(-1, keepdim=True)).square().sum(-1)


def hidden_error(reference: Float[Tensor, "n d"], states: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """||h_icl - h||^2 at the input of the head: L_MSE of the Linear TV paper is its mean."""
    return (reference.float() - states.float()).square().sum(-1)


def head_gain(rows: Float[Tensor, "C d"]) -> float:
    """||U_c||_2^2 of the support's unembedding rows, centred over them: label_logit_error <= head_gain x hidden_error
    where logits are linear in the state."""
    centred = rows.double() - rows.double().mean(0)
    return float(torch.linalg.matrix_norm(centred, ord=2).square())
