"""Training a function learner (Garg et al., arXiv 2208.01066): fresh functions and points at every step.

The loss is the mean squared error at every x of the prompt. Data depend on the configuration's seed and the step alone,
so a run that was killed goes on from its checkpoint with the same bits. Where a loss is not finite or an error blows
up, training stops, and what is kept is the last learner before.

Shapes: B prompts, n points, d dimensions.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError
from taskvec.evaluate.checkpoint import Checkpoint
from taskvec.files import replaced
from taskvec.lm.load import on_device
from taskvec.progress import note, track
from taskvec.regress.config import LearnerConfig
from taskvec.regress.functions import draw_inputs, generator_of
from taskvec.regress.learner import CONFIG, Learner, make_model, read_curve

CHECKPOINT, LOG = "checkpoint.safetensors", "log.json"
HELD_OUT = 512
"""Functions that the curve is measured on."""
BLOWN = 100
"""An error of so many times the variance is a divergence too."""
Curve = list[dict[str, float]]


class _Trained:
    """The learner's weights, as a checkpoint takes them. The last ones are the best."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.best: dict[str, Tensor] = {}

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All weights, by name."""
        yield from self.model.named_parameters()

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set all weights."""
        with torch.no_grad():
            for name, p in self.named():
                p.copy_(values[name])


def train(config: LearnerConfig, out: str | Path, *, resume: bool = False, device: str = "cpu") -> Learner:
    """Train, and every `check` steps write a checkpoint, a point of the curve, and the learner as it is.

    Raises `InputError` for a folder that holds another training (or this one, without `resume`), and where training
    diverges: the folder then still holds the last good learner.
    """
    folder = Path(out)
    held = Checkpoint(folder / CHECKPOINT, config.hash)
    if folder.exists() and not folder.is_dir():
        raise InputError("a folder for the learner", f"{folder}, a file", "name another")
    if any((folder / name).exists() for name in (CHECKPOINT, CONFIG)) and not resume:
        raise InputError("a new folder", f"{folder} holds a training", "pass --resume, or name another")
    model = on_device(make_model(config), device)
    trained = _Trained(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, foreach=True)
    done, _, _ = held.load(trained, optimizer)
    learner = Learner(model, config, curve=_read_log(folder, done))
    curve: Curve = list(learner.curve)
    model.train()
    loss = math.nan
    for step in track(range(done, config.steps), f"learner {config.name}", config.steps - done):
        loss = _step(learner, optimizer, step)
        if not math.isfinite(loss):
            raise _diverged(config, folder, step, curve)
        if (step + 1) % config.check == 0 or step + 1 == config.steps:
            error = float(errors_by_examples(learner, HELD_OUT, seed=config.seed)[-1])
            if not error <= BLOWN * config.family.variance:
                raise _diverged(config, folder, step, curve)
            curve.append({"step": float(step + 1), "loss": loss, "error": error})
            _write_log(folder, curve)
            held.save(trained, optimizer, (step + 1, error, 0))
            Learner(model, config, curve=curve).save_pretrained(folder)
            model.train()
            note(f"learner {config.name}, step {step + 1}: error {error / config.family.variance:.3f} of the variance")
    learner = Learner(model, config, curve=curve)
    learner.save_pretrained(folder)
    return learner


def batch(config: LearnerConfig, step: int) -> tuple[Float[Tensor, "B n d"], Float[Tensor, "B n"]]:
    """A step's points and values."""
    d, n = config.stage(step)
    generator = generator_of(config.seed, f"train {step}")
    functions = config.family.draw(config.batch, generator)
    x = draw_inputs((config.batch, n, config.d), generator)
    x[:, :, d:] = 0
    return x, functions(x)


def interleaved(x: Float[Tensor, "B n d"], y: Float[Tensor, "B n"]) -> Float[Tensor, "B n2 d"]:
    """x_1 y_1 x_2 y_2 ..., each y as (y, 0, ..., 0)."""
    rows = torch.zeros(x.shape[0], 2 * x.shape[1], x.shape[2])
    rows[:, 0::2] = x
    rows[:, 1::2, 0] = y
    return rows


def predictions(learner: Learner, x: Float[Tensor, "B n d"], y: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """The value predicted at every x from the pairs before it: one causal pass for all numbers of examples. Gradients
    flow, through the read-in too."""
    weight = learner.model.get_input_embeddings().weight
    rows = interleaved(x, y).to(weight) @ weight
    out: Tensor = learner.call(inputs_embeds=rows, use_cache=False).logits
    return out[:, 0::2, 0]


@torch.no_grad()
def errors_by_examples(learner: Learner, count: int, *, seed: int, points: int | None = None) -> Float[Tensor, " n"]:
    """The mean squared error on new functions with 0, 1, ... examples."""
    config = learner.settings
    generator = generator_of(seed, "held out 0")
    n = config.points if points is None else points
    if not 1 <= n <= config.positions:
        raise InputError(f"1 to {config.positions} points", str(n), "use as many as there are positions")
    x = draw_inputs((count, n, config.d), generator)
    y = config.family.draw(count, generator)(x)
    return (predictions(learner, x, y).cpu() - y).square().mean(0)


def _step(learner: Learner, optimizer: torch.optim.Optimizer, step: int) -> float:
    config = learner.settings
    x, y = batch(config, step)
    for group in optimizer.param_groups:
        group["lr"] = config.rate(step)
    optimizer.zero_grad()
    loss = (predictions(learner, x, y) - y.to(learner.device)).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(learner.model.parameters(), config.clip)
    optimizer.step()
    return float(loss.detach())


def _diverged(config: LearnerConfig, folder: Path, step: int, curve: Curve) -> InputError:
    kept = f"the learner of step {int(curve[-1]['step'])} is kept in {folder}" if curve else "none was kept yet"
    return InputError(
        "a loss that stays bounded", f"it diverged at step {step + 1} of {config.name}; {kept}", "lower lr or clip"
    )


def _write_log(folder: Path, curve: Curve) -> None:
    with replaced(folder / LOG) as new:
        new.write_text(json.dumps(curve) + "\n", "utf-8")


def _read_log(folder: Path, done: int) -> Curve:
    """What was written down up to the step of the checkpoint."""
    path = folder / LOG
    known = read_curve(path) if done and path.is_file() else []
    return [point for point in known if point["step"] <= done]
