"""What is measured of one learner under one seed: error beyond the trained number of examples, under shifts, and task
fidelity; beside what classical estimators make of the examples."""

from dataclasses import replace

from taskvec.progress import track
from taskvec.regress.functions import Functions, Inputs
from taskvec.regress.ground import Place, Prompts
from taskvec.regress.measure import Bench, draw_test, writers
from taskvec.regress.reference import references
from taskvec.regress.rows import YARDSTICK, RegressRow


def long_rows(bench: Bench) -> list[RegressRow]:
    """Error by the number of examples, and under shifts at twice the trained number, where methods are fitted."""
    place = Place(min(2 * bench.trained, bench.learner.settings.positions - 1))
    functions = {"test": bench.functions("test", bench.sizes.test)} | moved(bench)
    tests = [("test", draw_test(bench, "length", functions["test"], Place(k))) for k in bench.lengths]
    tests += [("test", draw_test(bench, name, functions["test"], where)) for name, where in shifts(bench, place)]
    tests += [(name, draw_test(bench, name, functions[name], place)) for name in functions if name != "test"]
    out = [row for _, test in tests for row in test.bare()]
    supports = {name: bench.support(name, some, place) for name, some in functions.items()}
    for writer, fitted in track(bench.fitted(place), f"length, seed {bench.seed}", len(writers())):
        tried = {name: fitted.tried(support) for name, support in supports.items()}
        out += [row for name, test in tests for row in test.rows(writer.name, tried[name])]
    return out


def shifts(bench: Bench, place: Place) -> list[tuple[str, Place]]:
    """What is shifted in the prompts: inputs, noise of the examples' values (a twentieth of the variance). The vectors'
    own support stays as in training."""
    noise = (bench.learner.settings.family.variance / 20) ** 0.5
    kinds: tuple[Inputs, ...] = ("skewed", "scaled", "orthogonal")
    return [*((name, replace(place, inputs=name)) for name in kinds), ("noise", replace(place, noise=noise))]


def moved(bench: Bench) -> dict[str, Functions]:
    """Other functions than it was trained on: weights of mean -0.75 and deviation 1.25."""
    family = bench.learner.settings.family
    if family.kind not in ("linear", "sparse-linear"):
        return {}
    return {"weights": bench.functions("weights", bench.sizes.test, replace(family, mean=-0.75, spread=1.25))}


def fidelity_rows(bench: Bench) -> list[RegressRow]:
    """Whose function is computed where the prompt shows no examples, and where it shows another function's."""
    functions = bench.functions("test", bench.sizes.test)
    out = list[RegressRow]()
    for name, place in (("no-examples", Place(0)), ("other-examples", Place(bench.trained, own=False))):
        test, support = draw_test(bench, name, functions, place), bench.support("test", functions, place)
        out += test.bare()
        for writer, fitted in track(bench.fitted(place), f"fidelity, seed {bench.seed}", len(writers())):
            out += test.rows(writer.name, fitted.tried(support))
    return out


def reference_rows(bench: Bench) -> list[RegressRow]:
    """The yardsticks by the number of examples."""
    functions = bench.functions("yardsticks", bench.sizes.test)
    out = list[RegressRow]()
    for k in bench.lengths:
        prompts = Prompts.draw(bench.learner, functions, 1, Place(k), seed=bench.seed, what=f"yardsticks {k}")
        for name, found in references(prompts.x[:, 0], prompts.y[:, 0]).items():
            wrong = (found - prompts.values[:, 0]).square()
            out.append(bench.row(name, YARDSTICK, ("length", k), wrong))
    return out


def curve_rows(bench: Bench) -> list[RegressRow]:
    """The bare model and the yardsticks by the number of examples."""
    functions = bench.functions("test", bench.sizes.test)
    tests = [draw_test(bench, "length", functions, Place(k)) for k in bench.lengths]
    return [test.bare()[0] for test in tests] + reference_rows(bench)
