"""Adaptive task vector (Kang et al., arXiv 2506.03426): a small language model writes a vector for every query.

**Idea.** A generator reads the query; one linear map turns its last state into a vector for every layer of the frozen
model. Both are trained on the answers of many tasks together, so an unseen task needs no demonstrations.

**Formula.** With z(x) the generator's state at its last token,

    v(x) = E z(x) + b,    resid[l] <- resid[l] + strength v_l(x) at the last prompt token, in every layer
    E, b <- argmin of the mean negative log-likelihood of the answer's tokens, over all tasks' rows

**Where we differ.** The paper's text edits the last prompt token (`where = last_prompt`), its released code every token
(`where = all`). The generator reads the same text in training and in use (the code does not), rows are shuffled, and
the epoch is chosen on dev. By default the generator is the model itself, and frozen (`tune = nothing`): its states are
computed once, and training is one small matrix by replays. States are centred and vectors counted in units of each
site's rms (`units = rms`), so that one learning rate serves all layers; training starts at no injection.
`AdaptiveTaskVector.paper()` and `.code()` have raw units, torch's first weights, strength 0.001, a trained generator.
`rank` puts a bottleneck before the last map.

**Cost.** A row costs one generator pass in all (frozen), and a replayed token and its answer an epoch. A query costs
one generator pass beside its own.

**When to use it.** When one model serves many tasks, and the prompt says which (an instruction, or texts that differ).
Look at its controls first: `adaptive-shuffled`, the task mean and the bias say whether the query matters.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from taskvec.errors import InputError
from taskvec.evaluate import Fitting, Lessons, above_zero, at_least_one, never_negative
from taskvec.evaluate.checkpoint import Checkpoint
from taskvec.evaluate.expansion import AdaptiveVectors, Expansion
from taskvec.evaluate.generator import HEAD, Generator, Reads, Tunes, Tuning, generator_of, start_lora, tunable
from taskvec.evaluate.joint import Joint
from taskvec.evaluate.lessons import rows_of
from taskvec.evaluate.shared import states_of
from taskvec.lm import LM, Encoded
from taskvec.progress import note, track
from taskvec.replay import Ask, Trial
from taskvec.sites import Site
from taskvec.tasks import Dev, Split, Train
from taskvec.vector import Add, Edit, TaskVector, Where


@dataclass(frozen=True)
class AdaptiveTaskVector:
    """Fields.

    - `generator`: the model that reads queries: an alias, a folder, a Hub id; empty: the target itself.
    - `reads`: the bare `prompt` with its instruction and template, or the `query`'s own words.
    - `tune`: train nothing of the generator, a LoRA of `lora_rank`, or all of it; `generator_lr`: at this rate.
    - `rank`: a bottleneck of this width before the last map; None: a full map.
    - `layers`: where it writes (empty: every layer); `where`: at which tokens; `strength`: see above.
    - `units`: `rms` or `raw`, see above.
    - `lr`, `weight_decay`: Adam's; `rows`: training rows a task (paper: 90); `epochs` over them in batches of `batch`.
    - `patience`: epochs without a lower dev loss before it stops; `n_dev`: dev items a task.
    - `checkpoint`: a file (`.safetensors`) that is written after each epoch, or a folder with such a file for every fit
      (one run, many seeds); where it exists, training goes on from there.
    """

    name: ClassVar[str] = "adaptive"
    cites: ClassVar[str] = "arXiv 2506.03426"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    source: ClassVar[type[AdaptiveVectors]] = AdaptiveVectors
    generator: str = ""
    reads: Reads = "prompt"
    tune: Tunes = "nothing"
    lora_rank: int = 8
    generator_lr: float = 1e-4
    rank: int | None = None
    layers: tuple[int, ...] = ()
    where: str = "last_prompt"
    strength: float = 1.0
    units: Literal["rms", "raw"] = "rms"
    lr: float = 5e-4
    weight_decay: float = 1e-5
    rows: int = 60
    epochs: int = 10
    batch: int = 32
    patience: int = 2
    n_dev: int = 20
    checkpoint: str = ""

    @classmethod
    def paper(cls, **fields: Any) -> "AdaptiveTaskVector":
        """The paper's text: GPT-2 trained as a whole, strength 0.001, 90 rows a task, 15 epochs, batch 1."""
        published = {"generator": "gpt2", "tune": "full", "generator_lr": 5e-4, "units": "raw", "strength": 1e-3}
        return cls(**{**published, "rows": 90, "epochs": 15, "batch": 1, "patience": 15, **fields})

    @classmethod
    def code(cls, **fields: Any) -> "AdaptiveTaskVector":
        """The released code: as the paper, but at every token."""
        return cls.paper(**{"where": "all", **fields})

    def fit(
        self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0
    ) -> AdaptiveVectors:
        """Train on all tasks together, keep the epoch that is best on dev. Takes one task or many."""
        self._check(lm)
        joint = Joint.of(train, dev)
        generator = generator_of(lm, self.generator, self.reads)
        with Fitting.of(lm, replace(self, checkpoint=""), joint.trains[0], seed=seed) as fitting, lm.frozen():
            learned, looked = joint.rows(self.rows, seed=seed), joint.looks(self.n_dev)
            joint.count(fitting, learned, looked)
            teach, look = (_Batch.all(self, lm, generator, some, seed) for some in (learned, looked))
            writer = _Writer(self, lm, generator, teach, seed)
            found = _trained(self, writer, teach, look, self._resumed(fitting, generator, joint))
            origin = joint.origin(fitting, found)
        where, made = Where.parse(self.where), generator.model
        expansion, tuning = writer.folded(), writer.tuning()
        out = AdaptiveVectors(expansion, writer.sites, where, self.strength, made, self.reads, origin, tuning)
        return out.use(writer.generator)

    def _check(self, lm: LM) -> None:
        at_least_one(self, "rows", "epochs", "batch", "patience", "n_dev", "lora_rank")
        above_zero(self, "lr", "generator_lr", "rank")
        never_negative(self, "weight_decay")
        if Where.parse(self.where).kind not in ("last_prompt", "each_last", "all"):
            raise InputError("adaptive.where = last_prompt, each_last or all", self.where, "name one of those")
        if self.strength == 0:
            raise InputError("a strength that is not 0", "adaptive.strength = 0: nothing would be trained", "raise it")
        if len(set(self.layers)) < len(self.layers):
            raise InputError("each layer once", f"adaptive.layers = {self.layers}", "mend it")
        for site in self.written(lm):
            lm.point(site)

    def written(self, lm: LM) -> tuple[Site, ...]:
        """The sites it writes at."""
        return tuple(Site("resid", layer) for layer in self.layers or range(lm.n_layers))

    def _resumed(self, fitting: Fitting, generator: Generator, joint: Joint) -> Checkpoint:
        """The checkpoint of exactly this fit."""
        depends = {**asdict(replace(self, checkpoint="")), "seed": fitting.seed, "data": joint.hashes}
        depends |= {"target": fitting.lm.fingerprint, "reader": generator.lm.fingerprint}
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        path = Path(self.checkpoint)
        path = path if path.suffix == ".safetensors" else path / f"{key[:16]}.safetensors"
        return Checkpoint(path if self.checkpoint else None, key)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Some rows: what the generator reads, and the lessons of the model. Each batch has an engine of its own: its
    prompts are short, and would pay for each other's attention in a larger one."""

    texts: list[Encoded]
    lessons: Lessons

    @classmethod
    def all(
        cls, method: AdaptiveTaskVector, lm: LM, generator: Generator, splits: Sequence[Split], seed: int
    ) -> "list[_Batch]":
        """The rows of all tasks, shuffled, in batches."""
        rows = rows_of(lm, splits)
        random.Random(f"adaptive {seed}").shuffle(rows)
        parts = [rows[i : i + method.batch] for i in range(0, len(rows), method.batch)]
        lessons = [Lessons.together(lm, part, whole=method.where == "all") for part in parts]
        return [cls(generator.texts(lm, one.engine.prompts), one) for one in lessons]

    def states(self, generator: Generator) -> Float[Tensor, "n g"]:
        """What the generator makes of the rows. Where it is the model itself, the engine holds the prompts already."""
        engine = self.lessons.engine
        if generator.lm is not engine.lm or generator.reads != "prompt":
            return generator.states(self.texts)
        found: Tensor = engine.answer([Trial(i) for i in range(len(self.texts))], Ask(states=(HEAD,))).states[HEAD]
        return found.to(engine.lm.device)


class _Writer:
    """What is trained: the expansion, and the generator's weights where they are. Shapes: g, k, S, d as there."""

    def __init__(
        self, method: AdaptiveTaskVector, lm: LM, generator: Generator, teach: list[_Batch], seed: int
    ) -> None:
        self.method, self.sites, self.seed = method, method.written(lm), seed
        self.generator, self.weights = _prepared(method, generator, seed)
        with torch.no_grad():
            self.held = {id(batch): batch.states(self.generator) for batch in teach}
        first = torch.cat(list(self.held.values()))
        prompts = teach[0].lessons.engine.prompts
        self.centre, self.spread, self.scale = _units(method, lm, first, self.sites, prompts)
        width = lm.width(self.sites[0])
        self.theta = {
            name: tensor.to(lm.device).requires_grad_()
            for name, tensor in _first(method, first.shape[1], len(self.sites), width, seed).items()
        }
        self.best = self.snapshot()

    def parameters(self) -> list[dict[str, Any]]:
        """Groups for the optimiser."""
        rates = ((self.theta, self.method.lr), (self.weights, self.method.generator_lr))
        return [{"params": list(some.values()), "lr": lr} for some, lr in rates if some]

    def rows(self, batch: _Batch) -> Float[Tensor, "n S d"]:
        """v(x) of a batch. Gradients flow where they are on."""
        z = (self._states(batch) - self.centre) / self.spread
        return Expansion(self.theta["write"], self.theta["bias"], self.theta.get("read"))(z) * self.scale[:, None]

    def _states(self, batch: _Batch) -> Float[Tensor, "n g"]:
        if self.weights:
            return self.generator.states(batch.texts)
        if id(batch) not in self.held:
            with torch.no_grad():
                self.held[id(batch)] = batch.states(self.generator)
        return self.held[id(batch)]

    def vectors(self, rows: Float[Tensor, "n S d"]) -> list[TaskVector]:
        """The rows as vectors."""
        where, strength = Where.parse(self.method.where), self.method.strength
        return [
            TaskVector(tuple(Edit(s, Add(part), where, strength) for s, part in zip(self.sites, row, strict=True)))
            for row in rows
        ]

    def snapshot(self) -> dict[str, Tensor]:
        """All that is trained, copied."""
        return {name: p.detach().cpu().clone() for name, p in self.named()}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained, by name."""
        yield from self.theta.items()
        yield from ((f"generator.{name}", p) for name, p in self.weights.items())

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set all that is trained."""
        with torch.no_grad():
            for name, p in self.named():
                p.copy_(values[name])

    def folded(self) -> Expansion:
        """The best expansion, for states and vectors as they are: without units."""
        self.put(self.best)
        bare = {name: p.detach() for name, p in self.theta.items()}
        write = bare["write"] * self.scale[:, None, None] / self.spread
        flat = Expansion(write, bare["bias"] * self.scale[:, None], bare.get("read"))
        bias = flat(-self.centre[None])[0]
        return Expansion(write.cpu(), bias.cpu(), None if flat.read is None else flat.read.cpu())

    def tuning(self) -> Tuning:
        """The best weights of the generator, where they were trained."""
        if not self.weights:
            return Tuning()
        weights = {name: self.best[f"generator.{name}"] for name in self.weights}
        return Tuning(self.method.tune, self.method.lora_rank, weights)


def _prepared(method: AdaptiveTaskVector, generator: Generator, seed: int) -> tuple[Generator, dict[str, nn.Parameter]]:
    """The generator with what is trained of it: a copy, so that the model given stays as it is."""
    if method.tune == "nothing":
        return generator, {}
    lm, weights = tunable(generator.lm, method.tune, method.lora_rank)
    if method.tune == "lora":
        start_lora(weights, seed)
    return replace(generator, lm=lm), weights


@torch.no_grad()
def _units(
    method: AdaptiveTaskVector, lm: LM, states: Float[Tensor, "n g"], sites: Sequence[Site], prompts: Sequence[Encoded]
) -> tuple[Tensor, Tensor, Tensor]:
    """(the centre of the states, their mean distance from it, each site's rms): 0 and 1 where units are raw."""
    if method.units == "raw":
        return torch.zeros_like(states[0]), torch.ones((), device=states.device), states.new_ones(len(sites))
    centre = states.mean(0)
    spread = (states - centre).norm(dim=1).mean().clamp_min(1e-6)
    clean, _ = states_of(lm, prompts[: method.batch], sites)
    rms = torch.stack([clean[site].square().mean().sqrt() for site in sites])
    return centre, spread, rms.to(states.device)


def _first(method: AdaptiveTaskVector, g: int, sites: int, d: int, seed: int) -> dict[str, Tensor]:
    """First weights. In units: no injection. Raw: torch's own for linear maps, uniform in +- 1 / sqrt(inputs)."""
    draws = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, inputs: int) -> Tensor:
        drawn: Tensor = (2 * torch.rand(*shape, generator=draws) - 1) / inputs**0.5
        return drawn

    k = method.rank or g
    read = {"read": uniform(k, g, inputs=g)} if method.rank else {}
    if method.units == "rms":
        return {"write": torch.zeros(sites, d, k), "bias": torch.zeros(sites, d), **read}
    return {"write": uniform(sites, d, k, inputs=k), "bias": uniform(sites, d, inputs=k), **read}


def _trained(
    method: AdaptiveTaskVector, writer: _Writer, teach: list[_Batch], look: list[_Batch], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Epoch by epoch; the writer keeps the best."""
    optimizer = torch.optim.Adam(writer.parameters(), weight_decay=method.weight_decay)
    done, best_loss, misses = checkpoint.load(writer, optimizer)
    for epoch in track(range(done + 1, method.epochs + 1), "adaptive", method.epochs - done):
        if misses >= method.patience:
            break
        order = list(range(len(teach)))
        random.Random(f"adaptive {writer.seed} {epoch}").shuffle(order)
        for place, number in enumerate(order):
            loss = _step(writer, optimizer, teach[number], first=(epoch, place) == (1, 0))
            note(f"epoch {epoch}, loss {loss:.3f}, dev {best_loss:.3f}")
        dev_loss = _dev_loss(writer, look)
        misses += 1
        if dev_loss < best_loss:
            writer.best, best_loss, misses = writer.snapshot(), dev_loss, 0
        done = epoch
        checkpoint.save(writer, optimizer, (done, best_loss, misses))
    if best_loss == float("inf"):
        raise InputError("a learning rate that trains", f"no finite dev loss with {method}", "lower adaptive.lr")
    count = sum(p.numel() for _, p in writer.named())
    return {"epochs": done, "dev_loss": best_loss, "parameters": count}


def _step(writer: _Writer, optimizer: torch.optim.Optimizer, batch: _Batch, *, first: bool) -> float:
    optimizer.zero_grad()
    with torch.enable_grad():
        rows = writer.rows(batch)
        leaf = rows.detach().requires_grad_()  # a step may take several passes, but goes through the writer once
        loss = batch.lessons.descend_each(writer.vectors(leaf), range(len(leaf)))
        if first:
            _check_gradient(leaf, writer.sites)
        rows.backward(leaf.grad)  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss


def _check_gradient(leaf: Tensor, sites: Sequence[Site]) -> None:
    """Refuse to train what cannot move the loss: a dead site, a strength of 0, a dtype in which it underflows."""
    there = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    dead = [str(s) for s, size in zip(sites, there.abs().amax((0, 2)), strict=True) if not size > 0]
    if dead:
        found = f"none at {', '.join(dead)}"
        fix = "raise adaptive.strength, train in float32, or leave these layers out"
        raise InputError("a gradient at every layer before training starts", found, fix)


@torch.no_grad()
def _dev_loss(writer: _Writer, look: list[_Batch]) -> float:
    written = [(batch, enumerate(writer.vectors(writer.rows(batch)))) for batch in look]
    losses = [loss for batch, pairs in written for loss in batch.lessons.losses(list(pairs))]
    return sum(losses) / len(losses)
