"""What is measured of one learner under one seed: error beyond the trained number of examples, under shifts, and task
fidelity; beside what classical estimators make of the examples."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.progress import track
from taskvec.regress.functions import Functions, Inputs
from taskvec.regress.ground import Place, Support
from taskvec.regress.measure import Bench, Stand, stand, writers
from taskvec.regress.reference import references
from taskvec.regress.rows import LENGTH, RegressRow
from taskvec.regress.writers import ask

JUDGED = 2
"""Prompts of each function that the classical estimators are tried on."""


def long_rows(bench: Bench) -> list[RegressRow]:
    """Error by the number of examples, and under shifts at twice the trained number, where methods are fitted."""
    place = Place(bench.beyond)
    functions = {"test": bench.functions("test", bench.sizes.test)} | moved(bench)
    stands = [("test", one) for one in lengths(bench, functions["test"])]
    stands += [("test", stand(bench, name, functions["test"], where)) for name, where in shifts(bench, place)]
    stands += [(name, stand(bench, name, functions[name], place)) for name in functions if name != "test"]
    out = [row for _, one in stands for row in one.bare()]
    supports = {name: bench.supports(name, some, place) for name, some in functions.items()}
    for writer, fitted in track(bench.fitted(place), f"length, seed {bench.seed}", len(writers())):
        tried = {name: fitted.tried(some) for name, some in supports.items()}
        out += [row for name, one in stands for row in one.rows(writer.name, tried[name])]
    return out


def lengths(bench: Bench, functions: Functions) -> list[Stand]:
    """The test prompts of every number of examples."""
    return [stand(bench, LENGTH, functions, Place(k)) for k in bench.lengths]


def shifts(bench: Bench, place: Place) -> list[tuple[str, Place]]:
    """What is shifted in the prompts: inputs, noise of the examples' values (a twentieth of the variance). The vectors'
    own support stays as in training."""
    noise = (bench.learner.settings.family.variance / 20) ** 0.5
    kinds: tuple[Inputs, ...] = ("skewed", "scaled", "orthogonal")
    return [*((name, replace(place, inputs=name)) for name in kinds), ("noise", replace(place, noise=noise))]


def moved(bench: Bench) -> dict[str, Functions]:
    """Other functions than it was trained on: weights of mean -0.75 and standard deviation 1.25."""
    family = bench.learner.settings.family
    if family.kind not in ("linear", "sparse-linear"):
        return {}
    return {"weights": bench.functions("weights", bench.sizes.test, replace(family, mean=-0.75, spread=1.25))}


def fidelity_rows(bench: Bench) -> list[RegressRow]:
    """Whose function is computed where the prompt shows no examples, and where it shows other functions'."""
    functions = bench.functions("test", bench.sizes.test)
    out = list[RegressRow]()
    for name, place in (("no-examples", Place(0)), ("other-examples", Place(bench.trained, own=False))):
        one, supports = stand(bench, name, functions, place), bench.supports("test", functions, place)
        out += [*one.bare(), one.yardstick("least squares on the support", probe(supports[""], one))]
        for writer, fitted in track(bench.fitted(place), f"fidelity, seed {bench.seed}", len(writers())):
            out += one.rows(writer.name, fitted.tried(supports))
    return out


def probe(support: Support, one: Stand) -> Float[Tensor, "F P"]:
    """What the support alone tells, without vectors: least squares from its queries to the model's predictions behind
    own examples, the very data that `linear` is fitted on."""
    x = support.placed.x[..., -1, :]
    told = ask(support.best, [[None] * support.best.count]).predictions[0]
    weights = torch.linalg.lstsq(x, told[..., None]).solution
    asked: Tensor = (one.prompts.x[..., -1, :] @ weights)[..., 0]
    return asked


def reference_rows(bench: Bench) -> list[RegressRow]:
    """The yardsticks by the number of examples, on the first prompts of the length test."""
    out = list[RegressRow]()
    for one in lengths(bench, bench.functions("test", bench.sizes.test)):
        x, y = (part[:, :JUDGED].flatten(0, 1) for part in (one.prompts.x, one.prompts.y))
        shape = (one.prompts.count, -1)
        out += [one.yardstick(name, found.reshape(shape)) for name, found in references(x, y).items()]
    return out


def curve_rows(bench: Bench) -> list[RegressRow]:
    """The bare model and the yardsticks by the number of examples."""
    stands = lengths(bench, bench.functions("test", bench.sizes.test))
    return [*(one.bare()[0] for one in stands), *reference_rows(bench)]
