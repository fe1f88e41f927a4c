"""A checkpoint: after a kill training goes on from it with the same bits. One safetensors file, written in one step."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from taskvec.errors import InputError
from taskvec.files import replaced

Place = tuple[int, float, int]
"""(epoch, best dev loss, epochs without a better one)."""


@runtime_checkable
class Trained(Protocol):
    """What is trained: named tensors, and the best of them so far."""

    best: dict[str, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained, by name."""
        ...

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set all that is trained."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A file (None: no checkpoints) for the training whose settings and data hash to `key`."""

    path: Path | None
    key: str

    def save(self, trained: Trained, optimizer: torch.optim.Optimizer, place: Place) -> None:
        """Write it beside its final place and move it there in one step."""
        if self.path is None:
            return
        tensors = {f"now.{name}": p for name, p in trained.named()}
        tensors |= {f"best.{name}": p for name, p in trained.best.items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in state.items()}
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        content = save_tensors(plain, {"key": self.key, "place": json.dumps(place)})
        with replaced(self.path) as new:
            new.write_bytes(content)

    def load(self, trained: Trained, optimizer: torch.optim.Optimizer) -> Place:
        """Put everything back as it was saved. Raises `InputError` for a checkpoint of another fit."""
        if self.path is None or not self.path.exists():
            return 0, float("inf"), 0
        tensors, about = _read(self.path)
        if about.get("key") != self.key:
            found = f"{self.path}, one of other settings, data or models"
            raise InputError("a checkpoint of this very fit", found, "name another file, or remove it to start again")
        trained.put(_under(tensors, "now."))
        trained.best = _under(tensors, "best.")
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "adam.").items():
            i, _, field = name.partition(".")
            states.setdefault(int(i), {})[field] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        epoch, best_loss, misses = json.loads(about["place"])
        return epoch, best_loss, misses


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError("a checkpoint that can be read", f"{path} ({error})", "remove it to start again") from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
