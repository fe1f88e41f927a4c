"""The divergences between two next-token distributions. Shapes: n queries, V vocabulary, C tokens of the support."""

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
