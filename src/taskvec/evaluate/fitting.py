"""What every fit shares: one task or many, its demonstrations and queries, its cost, its origin, states by replay."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate.shared import states_of
from taskvec.hooks import prove
from taskvec.lm import LM, Encoded
from taskvec.lm.model import Meter
from taskvec.prompts import Example
from taskvec.replay import packs
from taskvec.replay.stagger import staggers
from taskvec.sites import Site
from taskvec.tasks import Dev, Split, Train
from taskvec.vector import Cost, ModelId, Origin
from taskvec.vector.origin import FormatRecord

VERSIONS = ("taskvec", "torch", "transformers")


def single(train: Train | Sequence[Train], dev: Dev | Sequence[Dev]) -> tuple[Train, Dev]:
    """The one task a single-task method was given. Raises `InputError` for several."""
    trains = [train] if isinstance(train, Train) else list(train)
    devs = [dev] if isinstance(dev, Dev) else list(dev)
    if len(trains) != 1 or len(devs) != 1:
        raise InputError("one task", f"{len(trains)} train and {len(devs)} dev splits", "fit one vector per task")
    return trains[0], devs[0]


def changed_by_context(lm: LM, site: Site) -> None:
    """Check a site at which demonstrations can change the last token's state: all but `embed`."""
    lm.point(site)
    if site.kind == "embed":
        raise InputError("a site that demonstrations change", "embed: a token's own embedding", "use resid[l]")


def above_zero(method: Any, *names: str) -> None:
    """Raise `InputError` where one of these hyper-parameters is not a number above 0 (None: left to the method)."""
    for name in names:
        value = getattr(method, name)
        if value is not None and not value > 0:
            raise InputError(f"{method.name}.{name} above 0", str(value), "mend it")


def never_negative(method: Any, *names: str) -> None:
    """Raise `InputError` where one of these hyper-parameters is below 0 or no number."""
    for name in names:
        if not getattr(method, name) >= 0:
            raise InputError(f"{method.name}.{name} of 0 or more", str(getattr(method, name)), "mend it")


def at_least_one(method: Any, *names: str) -> None:
    """Raise `InputError` where one of these hyper-parameters, each a number of things, is below 1."""
    for name in names:
        if getattr(method, name) < 1:
            raise InputError(f"{method.name}.{name} of at least 1", str(getattr(method, name)), "raise it")


@dataclass(eq=False)
class Fitting:
    """One fit in progress: the seed's demonstrations, and what has been spent so far.

    `read` holds the inputs whose gold outputs were read, each counted once; `labels` counts more of them, known to be
    others; `queries` counts inputs read without their outputs.
    """

    lm: LM
    method: Any
    train: Train
    seed: int
    demos: tuple[Example, ...]
    meter: Meter
    started: float = field(default_factory=time.perf_counter)
    read: set[str] = field(default_factory=set)
    labels: int = 0
    queries: int = 0

    @classmethod
    @contextmanager
    def of(cls, lm: LM, method: Any, train: Train, *, seed: int) -> Iterator["Fitting"]:
        """Start the clock and the token count."""
        demos = train.demonstrations(seed=seed)
        ready(lm)
        with lm.metered() as meter:
            yield cls(lm, method, train, seed, demos, meter)

    def show(self) -> tuple[Example, ...]:
        """The seed's demonstrations, for prompts that show them: their labels count as read."""
        self.read |= {demo.input for demo in self.demos}
        return self.demos

    def states(
        self, examples: Sequence[Example], sites: Sequence[Site], *, shown: Sequence[Example] = ()
    ) -> Mapping[Site, Float[Tensor, "n w"]]:
        """The states at the last prompt token of each example's prompt behind the demonstrations `shown`."""
        format = self.train.spec.format
        self.read |= {example.input for example in shown}
        return self.states_of([self.lm.encode(format.prompt(example.input, shown)) for example in examples], sites)

    def states_of(self, prompts: Sequence[Encoded], sites: Sequence[Site]) -> Mapping[Site, Float[Tensor, "n w"]]:
        """The states at the last token of each prompt."""
        states, seconds = states_of(self.lm, prompts, sites)
        self.started -= seconds
        return states

    def origin(
        self, *, prompt: Literal["zero-shot", "few-shot"] = "zero-shot", found: Mapping[str, Any] | None = None
    ) -> Origin:
        """The origin of what was fitted. `found` is what the fit chose and measured, as plain JSON values."""
        spec = self.train.spec
        seconds = time.perf_counter() - self.started
        return Origin(
            method=self.method.name,
            hyperparameters=_plain(asdict(self.method)),
            model=ModelId(id=self.lm.id, revision=self.lm.revision, fingerprint=self.lm.fingerprint),
            tokenizer_hash=self.lm.tokenizer_hash,
            format=FormatRecord.of(spec.format),
            task=spec.name,
            data_hash=spec.data_hash,
            n_test=spec.n_test,
            labels=spec.labels,
            seed=self.seed,
            demos=self.demos,
            prompt=prompt,
            max_new_tokens=longest_answer(self.lm, self.train),
            cost=Cost(
                labels=len(self.read) + self.labels, queries=self.queries, tokens=self.meter.tokens, seconds=seconds
            ),
            versions={name: version(name) for name in VERSIONS},
            found=_plain(found or {}),
        )


def ready(lm: LM) -> None:
    """Prove what is proved once per model: no part of what a fit costs."""
    prove(lm)
    if packs(lm) is None:
        staggers(lm)


def longest_answer(lm: LM, split: Split) -> int:
    """The tokens of a task's longest answer, with its terminator."""
    from taskvec.evaluate.observe import first_tokens

    return max(len(ids) for ids in first_tokens(lm, split, terminator=True))


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what JSON gives back."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple | list) else value
