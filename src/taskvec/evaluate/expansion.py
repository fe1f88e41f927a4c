"""Adaptive vectors (Kang et al., arXiv 2506.03426): a vector source that a generator and an expansion write.

    v(x) = E z(x) + b, one row a site;      h <- h + strength v_s(x) at site s

Saved as a folder: the expansion (and what was trained of the generator) in safetensors, and one JSON that names the
generator by id, revision and fingerprint. The generator's own weights are not in it.

Shapes: n prompts, g width of the generator's states, k inputs of the last map (g, or the rank of a bottleneck), S
sites, d their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from taskvec.evaluate.generator import Generator, Reads, Tunes, Tuning, check_generator, named
from taskvec.lm import LM, Encoded
from taskvec.results import BIAS
from taskvec.sites import Site
from taskvec.vector import Add, Edit, ModelId, Origin, TaskVector, Where
from taskvec.vector.card import card as make_card
from taskvec.vector.sealed import Sealed, sha
from taskvec.vector.store import CARD, replacing

TENSORS, GENERATOR = "expansion.safetensors", "generator.safetensors"


@dataclass(frozen=True, eq=False)
class Expansion:
    """E and b: `write` read z + `bias` (without `read`: `write` z + `bias`)."""

    write: Float[Tensor, "S d k"]
    bias: Float[Tensor, "S d"]
    read: Float[Tensor, "k g"] | None = None

    def __call__(self, z: Float[Tensor, "n g"]) -> Float[Tensor, "n S d"]:
        """The rows of every state."""
        inputs = z if self.read is None else z @ self.read.T
        rows: Tensor = torch.einsum("sdk,nk->nsd", self.write, inputs) + self.bias
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        some = {"write": self.write, "bias": self.bias, "read": self.read}
        return {name: tensor for name, tensor in some.items() if tensor is not None}


class _Record(Sealed):
    """The file `taskvec_adaptive.json`."""

    mark: ClassVar[str] = "taskvec_adaptive.json"
    what: ClassVar[str] = "adaptive vector"

    generator: ModelId
    reads: Reads
    tune: Tunes
    lora_rank: int
    sites: tuple[str, ...]
    where: str
    strength: float
    origin: Origin


MARK = _Record.mark


@dataclass(frozen=True, eq=False)
class AdaptiveVectors:
    """A vector source: reads each prompt with its generator and writes one row a site.

    The generator is loaded on first use and checked against its fingerprint; `use` gives one that is loaded already.
    """

    expansion: Expansion
    sites: tuple[Site, ...]
    where: Where
    strength: float
    generator: ModelId
    reads: Reads
    origin: Origin
    tuning: Tuning = field(default_factory=Tuning)
    source: str | None = None
    _held: dict[str, Generator] = field(default_factory=dict, init=False, repr=False)

    def vectors(self, lm: LM, prompts: Sequence[Encoded]) -> list[TaskVector | None]:
        """One vector for each prompt."""
        return [self._vector(row) for row in self.rows(lm, prompts)]

    @torch.no_grad()
    def rows(self, lm: LM, prompts: Sequence[Encoded]) -> Float[Tensor, "n S d"]:
        """v(x) of each prompt, before the strength."""
        generator = self._held.get("generator")
        if generator is None:
            generator = named(lm, self.generator, self.reads, self.tuning)
            if generator.lm is not lm:
                self._held["generator"] = generator
        states = generator.states(generator.texts(lm, prompts))
        return self.expansion(states.to(self.expansion.bias))

    def use(self, generator: Generator) -> "AdaptiveVectors":
        """Take this generator, which has its trained weights already. Returns the source itself."""
        if self.tuning.weights is None:
            check_generator(generator.lm, self.generator)
        self._held["generator"] = generator
        return self

    def bias_only(self) -> TaskVector:
        """What it writes whatever the query: the expansion's bias."""
        origin = self.origin.model_copy(update={"method": self.origin.method + BIAS})
        return TaskVector(self._edits(self.expansion.bias), origin)

    def _vector(self, row: Float[Tensor, "S d"]) -> TaskVector:
        return TaskVector(self._edits(row), self.origin)

    def _edits(self, row: Float[Tensor, "S d"]) -> tuple[Edit, ...]:
        pairs = zip(self.sites, row, strict=True)
        return tuple(Edit(site, Add(part), self.where, self.strength) for site, part in pairs)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False, card: str | None = None) -> None:
        """Write the folder. All or nothing."""
        contents = {TENSORS: _packed(self.expansion.tensors()), CARD: (card or make_card(self)).encode()}
        if self.tuning.weights is not None:
            contents[GENERATOR] = _packed(self.tuning.weights)
        record = _Record(
            files={name: sha(content) for name, content in contents.items()},
            generator=self.generator,
            reads=self.reads,
            tune=self.tuning.kind,
            lora_rank=self.tuning.rank,
            sites=tuple(map(str, self.sites)),
            where=str(self.where),
            strength=self.strength,
            origin=self.origin,
        )
        with replacing(Path(folder), overwrite=overwrite, mark=MARK) as new:
            for name, content in contents.items():
                (new / name).write_bytes(content)
            record.write(new)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "AdaptiveVectors":
        """Read the folder, checking every byte. Raises `VectorCorrupt` for anything missing, added or changed."""
        folder = Path(folder)
        record = _Record.read(folder)
        tensors = _unpacked(folder, TENSORS)
        weights = _unpacked(folder, GENERATOR) if GENERATOR in record.files else None
        try:
            expansion = Expansion(tensors["write"], tensors["bias"], tensors.get("read"))
        except KeyError as error:
            raise _Record.corrupt(folder, f"{TENSORS} has no {error}") from None
        return cls(
            expansion,
            tuple(map(Site.parse, record.sites)),
            Where.parse(record.where),
            record.strength,
            record.generator,
            record.reads,
            record.origin,
            Tuning(record.tune, record.lora_rank, weights),
            str(folder),
        )


def _packed(tensors: Any) -> bytes:
    return save_tensors({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})


def _unpacked(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_tensors((folder / name).read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise _Record.corrupt(folder, f"{name} cannot be read ({error})") from None
