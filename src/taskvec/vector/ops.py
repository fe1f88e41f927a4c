"""What happens at a site: a closed set of pure, differentiable functions of the activation.

Shapes: n tokens, w width of the site, r rank.

Arithmetic is float32 (float64 for float64 models) with one cast back to the activation's dtype; nothing is written in
place.
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import VectorMismatch


@dataclass(frozen=True, eq=False)
class Op:
    """Base class. A subclass is a frozen dataclass of tensors and floats with `apply`."""

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """The edited activations. `h` is float32 or float64, and so is the result."""
        raise TypeError(f"{type(self).__name__} has no apply")

    @property
    def width(self) -> int:
        """The width of the site it fits."""
        return next(iter(self.tensors().values())).shape[-1]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def numbers(self) -> dict[str, float]:
        """Its other fields by name."""
        return {f.name: float(value) for f in fields(self) if isinstance(value := getattr(self, f.name), int | float)}

    def __call__(self, h: Float[Tensor, "n w"], strength: float = 1.0) -> Float[Tensor, "n w"]:
        """h + strength (op(h) - h), in h's dtype and on h's device. Strength 0 returns `h` itself."""
        if strength == 0.0:
            return h
        if self.width != h.shape[-1]:
            raise VectorMismatch(
                f"a site of width {self.width}", f"width {h.shape[-1]}", "use the model it was made for"
            )
        wide = h if h.dtype == torch.float64 else h.float()
        edited = self.apply(wide)
        if strength != 1.0:
            edited = wide + strength * (edited - wide)
        return edited.to(h.dtype)


def like(tensor: Tensor, h: Tensor) -> Tensor:
    """`tensor` with h's dtype and device (gradients pass)."""
    return tensor.to(device=h.device, dtype=h.dtype)


@dataclass(frozen=True, eq=False)
class Add(Op):
    """h + v."""

    vector: Float[Tensor, " w"]

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """h + v."""
        return h + like(self.vector, h)


@dataclass(frozen=True, eq=False)
class Replace(Op):
    """v, whatever h was."""

    vector: Float[Tensor, " w"]

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """v for every token."""
        return like(self.vector, h).expand_as(h)


@dataclass(frozen=True, eq=False)
class Blend(Op):
    """keep h + weight v (I2CL's linear combination of an output and a context vector)."""

    vector: Float[Tensor, " w"]
    keep: float = 0.5
    weight: float = 0.5

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """keep h + weight v."""
        return self.keep * h + self.weight * like(self.vector, h)


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """h + (h R') L + b: a map of rank r kept as two factors, R (r, w) that reads and L (r, w) that writes.

    `bias` is optional. Linear TV is this with R = the zero-shot states and L = the dual coefficients.
    """

    read: Float[Tensor, "r w"]
    write: Float[Tensor, "r w"]
    bias: Float[Tensor, " w"] | None = None

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """h + (h R') L + b."""
        moved = h + (h @ like(self.read, h).T) @ like(self.write, h)
        return moved if self.bias is None else moved + like(self.bias, h)


@dataclass(frozen=True, eq=False)
class AddKeepNorm(Op):
    """(h + u) scaled back to the norm of h. A zero sum stays zero.

    u = v where `steer` is 0. Else u = steer s |h| v / |v| with s = 1 + max(0, cos(h, -v)): a share of h's own norm, up
    to twice as much where h points away from v (ICV, arXiv 2311.06668, as its code does).
    """

    vector: Float[Tensor, " w"]
    steer: float = 0.0

    def apply(self, h: Float[Tensor, "n w"]) -> Float[Tensor, "n w"]:
        """(h + u) |h| / |h + u|."""
        norm, tiny = h.norm(dim=-1, keepdim=True), torch.finfo(h.dtype).tiny
        moved = h + self._toward(h, norm, tiny)
        new = moved.norm(dim=-1, keepdim=True)
        kept: Tensor = moved / new.clamp_min(tiny) * norm  # in this order: norm / tiny is infinite
        return kept

    def _toward(self, h: Tensor, norm: Tensor, tiny: float) -> Tensor:
        v = like(self.vector, h)
        if self.steer == 0.0:
            return v
        unit = v / v.norm().clamp_min(tiny)
        away = -(h / norm.clamp_min(tiny) * unit).sum(-1, keepdim=True)
        toward: Tensor = self.steer * (1 + away.clamp_min(0.0)) * norm * unit
        return toward


OPS: dict[str, type[Op]] = {
    "add": Add,
    "replace": Replace,
    "blend": Blend,
    "affine": Affine,
    "add-keep-norm": AddKeepNorm,
}
"""The ops a vector folder may name."""
