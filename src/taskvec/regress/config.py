"""The settings of a function learner: what it is, what it learns, how it is trained. YAML, every key checked."""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from taskvec.errors import InputError, unknown
from taskvec.regress.functions import FunctionClass, Kind

_CONFIGS = Path(str(files("taskvec.regress") / "data" / "configs"))
Positive = Annotated[int, Field(ge=1, strict=True)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Curriculum(BaseModel):
    """Dimensions and points that grow every `every` steps (0: no curriculum). Coordinates beyond are 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: Annotated[int, Field(ge=0)] = 0
    d: Positive = 1
    points: Positive = 1
    d_by: Positive = 1
    points_by: Positive = 2


class LearnerConfig(BaseModel):
    """A learner. `points` are the pairs of a training prompt, `positions` those the position table holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    function: Kind
    d: Positive
    points: Annotated[int, Field(ge=2)]
    positions: Positive
    layers: Positive
    heads: Positive
    width: Positive
    sparsity: Positive = 3
    hidden: Positive = 100
    depth: Positive = 4
    steps: Positive
    batch: Positive = 64
    lr: Rate = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Share = 0.0
    clip: Rate = 1.0
    curriculum: Curriculum = Curriculum()
    check: Positive = 500
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> "LearnerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")
        if self.positions < self.points:
            raise ValueError(f"positions {self.positions} are fewer than the {self.points} points it is trained on")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of all settings."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def family(self) -> FunctionClass:
        """The functions it learns."""
        return FunctionClass(self.function, self.d, self.sparsity, self.hidden, self.depth)

    def stage(self, step: int) -> tuple[int, int]:
        """(dimensions, points) of a training step, counted from 0."""
        plan = self.curriculum
        if not plan.every:
            return self.d, self.points
        risen = step // plan.every
        return min(self.d, plan.d + risen * plan.d_by), min(self.points, plan.points + risen * plan.points_by)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then constant, then linear to 0 over the last
        `decay` of all steps."""
        falling = max(1, round(self.decay * self.steps))
        up = min(1.0, (step + 1) / (self.warmup + 1))
        down = min(1.0, (self.steps - step) / falling) if self.decay else 1.0
        return self.lr * min(up, down)


@cache
def builtin_configs() -> dict[str, LearnerConfig]:
    """The configurations that come with the library, by name."""
    return {path.stem: read_config(path) for path in sorted(_CONFIGS.glob("*.yaml"))}


def load_config(source: str) -> LearnerConfig:
    """The configuration in a YAML file, or the built-in one of that name."""
    if os.path.isfile(source):  # unlike Path's, no error for a name that is too long
        return read_config(Path(source))
    if source not in builtin_configs():
        raise unknown("a configuration file or a built-in learner", source, builtin_configs())
    return builtin_configs()[source]


def read_config(path: Path) -> LearnerConfig:
    """The configuration in a YAML file. Raises `InputError` with the bad key."""
    try:
        plain = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # yaml lets all of them out
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"a learner's configuration in {path}", found, "mend it") from None
    return checked(plain, str(path))


def checked(plain: Any, place: str) -> LearnerConfig:
    """Plain values as a configuration."""
    if not isinstance(plain, Mapping):
        raise InputError(f"a learner's configuration in {place}", type(plain).__name__, "write keys and values")
    try:
        return LearnerConfig.model_validate(dict(plain))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = Curriculum if first["loc"][0] == "curriculum" else LearnerConfig
            name = str(first["loc"][-1])
            raise unknown(f"the keys of a learner in {place}", name, known.model_fields) from None
        said = first["msg"].removeprefix("Value error, ")
        found = f"{key}: {said}" if key else said
        raise InputError(f"a learner's configuration in {place}", found, "mend it") from None
