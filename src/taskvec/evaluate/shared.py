"""Work that several methods ask for on one task, done once: states of a list of prompts, and their cached prefixes.

Inside `shared_work(lm)` an identical request is answered from memory. It depends on the request alone, never on who
asked first, so that results are the same bits in any order. Its tokens are charged to everyone who makes it: a method's
`fit_tokens` are those it would have by itself; so are its `fit_seconds`, but for dev's prefixes.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Packed, Plain, Trial, replay
from taskvec.sites import Site

KEPT = 3
"""Engines held at a time: each keeps the keys and values of its prompts."""
States = Mapping[Site, Float[Tensor, "n w"]]


@dataclass
class _Known:
    states: States
    tokens: int
    seconds: float


@dataclass
class Shared:
    """What was computed so far. `saved` tokens were asked for and not computed again."""

    states: dict[object, _Known] = field(default_factory=dict)
    engines: dict[object, Packed | Plain] = field(default_factory=dict)
    saved: int = 0


@contextmanager
def shared_work(lm: LM) -> Iterator[Shared]:
    """Remember inside. Forgotten at the end, and out of sight while an adapter changes the model (`lm.unproved`)."""
    before, shared = lm.proofs.get("shared"), Shared()
    lm.proofs["shared"] = shared
    try:
        yield shared
    finally:
        del lm.proofs["shared"]
        if before is not None:
            lm.proofs["shared"] = before


def states_of(lm: LM, prompts: Sequence[Encoded], sites: Sequence[Site]) -> tuple[States, float]:
    """The states at the last token of each prompt, and the seconds a request answered from memory once took."""
    shared: Shared | None = lm.proofs.get("shared")
    if shared is None or any(prompt.embeds is not None for prompt in prompts):
        return _asked(lm, prompts, sites), 0.0
    key = tuple(prompt.ids for prompt in prompts)
    known = shared.states.get(key)
    if known is None or not set(sites) <= known.states.keys():
        start = time.perf_counter()
        with lm.metered() as meter:
            states = _asked(lm, prompts, list(dict.fromkeys([*_everywhere(lm), *sites])))
        shared.states[key] = _Known(states, meter.tokens, time.perf_counter() - start)
        return {site: states[site] for site in sites}, 0.0
    lm.charge(known.tokens)
    shared.saved += known.tokens
    return {site: known.states[site] for site in sites}, known.seconds


def engine_of(lm: LM, prompts: Sequence[Encoded], starts: Sequence[int]) -> Packed | Plain:
    """`replay` with its prompts kept, for prompts that every method of a task asks about (dev's, test's)."""
    shared: Shared | None = lm.proofs.get("shared")
    if shared is None or any(prompt.embeds is not None for prompt in prompts):
        return replay(lm, prompts, starts=starts)
    key = tuple(prompt.ids for prompt in prompts), tuple(starts)
    engine = shared.engines.pop(key, None)
    if isinstance(engine, Packed):
        lm.charge(engine.held)
        shared.saved += engine.held
    shared.engines[key] = engine = engine or replay(lm, prompts, starts=starts, keep=True)
    while len(shared.engines) > KEPT:
        del shared.engines[next(iter(shared.engines))]
    return engine


def _asked(lm: LM, prompts: Sequence[Encoded], sites: Sequence[Site]) -> States:
    return replay(lm, prompts).answer([Trial(i) for i in range(len(prompts))], Ask(states=tuple(sites))).states


def _everywhere(lm: LM) -> list[Site]:
    """The sites methods read most: one pass serves whoever comes."""
    kinds, refused = ("resid", "heads", "lm_head_in"), lm.proofs.get("sites", {})
    return [site for site in lm.sites() if site.kind in kinds and site not in refused]
