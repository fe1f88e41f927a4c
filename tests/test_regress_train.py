"""Training function learners: the steps against Adam written out by hand, the data, kills and resumptions bit for bit,
divergence, failed writes, and the folder a learner lives in."""

import importlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from taskvec.errors import InputError, UnknownName, VectorMismatch
from taskvec.evaluate.checkpoint import Checkpoint
from taskvec.regress.config import LearnerConfig
from taskvec.regress.learner import Learner, make_model, shipped
from taskvec.regress.training import batch, errors_by_examples, interleaved, predictions, train

training: Any = importlib.import_module("taskvec.regress.training")  # the package's own `train` is the function
CHECKPOINT, LOG = "checkpoint.safetensors", "log.json"
LEARNER = ["learner.safetensors", "learner.json", "curve.json"]
Train = Callable[..., Learner]


@cache
def config(**changes: Any) -> LearnerConfig:
    sizes = {"d": 2, "points": 3, "positions": 5, "layers": 2, "heads": 2, "width": 16}
    plain = {"name": "mini", "function": "linear", "steps": 6, "batch": 4, "check": 2, "lr": 0.01}
    return LearnerConfig.model_validate(plain | sizes | changes)


def mini(**changes: Any) -> Learner:
    """An untrained learner."""
    made = config(**changes)
    return Learner(make_model(made), made)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in learner.model.named_parameters()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


class Killed(Exception):
    """What a test's training dies of."""


def dies_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The training dies before that step, counted from 0."""
    real = training._step

    def mortal(learner: Learner, optimizer: Any, at: int) -> float:
        if at == step:
            raise Killed
        return float(real(learner, optimizer, at))

    monkeypatch.setattr(training, "_step", mortal)


def killed(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, made: LearnerConfig | None = None) -> Path:
    """The folder of a training that died before step `at`."""
    with monkeypatch.context() as patch:
        dies_at(patch, at)
        with pytest.raises(Killed):
            train(made or config(), folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed. Only read."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(config(), folder)
    return folder


def assert_as_unbroken(folder: Path, unbroken: Path) -> None:
    """Every file holds the same bits."""
    assert {path.name for path in folder.iterdir()} == {*LEARNER, CHECKPOINT, LOG}
    for name in (*LEARNER, LOG):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes()
    assert_same(load_file(folder / CHECKPOINT), load_file(unbroken / CHECKPOINT))


# --- a step ----------------------------------------------------------------------------------------------------------


def loss_by_hand(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """x1 y1 x2 y2 ..., token by token as mixtures of the read-in's rows; the mean squared error at every x."""
    table = model.transformer.wte.weight
    rows = []
    for points, values in zip(x.double(), y.double(), strict=True):
        for point, value in zip(points, values, strict=True):
            rows += [sum(point[i] * table[i] for i in range(len(point))), value * table[0]]
    read = torch.stack(rows).reshape(len(x), -1, table.shape[1])
    out = model(inputs_embeds=read).logits[:, :, 0]
    each = [(out[b, 2 * i] - y[b, i].double()) ** 2 for b in range(len(x)) for i in range(x.shape[1])]
    return torch.stack(each).sum() / len(each)


def adam_by_hand(made: LearnerConfig, rates: list[float]) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """(loss before, gradient norm, weights after) each step, by the formulas of Adam and of clipping by the norm."""
    model = make_model(made).double()
    weight = dict(model.named_parameters())
    first, second = ({name: torch.zeros_like(p) for name, p in weight.items()} for _ in range(2))
    for step, rate in enumerate(rates):
        loss = loss_by_hand(model, *batch(made, step))
        grads = dict(zip(weight, torch.autograd.grad(loss, list(weight.values())), strict=True))
        norm = float(sum(g.square().sum() for g in grads.values())) ** 0.5
        with torch.no_grad():
            for name, p in weight.items():
                g = grads[name] * min(1.0, made.clip / norm)
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g.square()
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p -= rate * mean / (square.sqrt() + 1e-8)
        yield float(loss.detach()), norm, {name: p.detach().clone() for name, p in weight.items()}


def test_steps_are_adam_steps_on_the_error_at_every_x(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in float64: where a gradient is 0 but for rounding (keys' biases), Adam turns float32's rounding into whole steps
    monkeypatch.setattr(training, "make_model", lambda made: make_model(made).double())
    made = config(steps=4, check=1, lr=0.02, warmup=1, decay=0.5, clip=2.0)
    steps = list(adam_by_hand(made, [0.01, 0.02, 0.02, 0.01]))
    norms = [norm for _, norm, _ in steps]
    assert min(norms) < made.clip < max(norms)  # some are clipped, some are not
    learner = train(made, tmp_path)
    assert [point["loss"] for point in learner.curve] == pytest.approx([loss for loss, _, _ in steps], rel=1e-6)
    for name, p in weights(learner).items():
        torch.testing.assert_close(p, steps[-1][2][name], atol=1e-6, rtol=1e-5, msg=name)


def test_one_step_is_one_adam_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "make_model", lambda made: make_model(made).double())
    made = config(steps=1)
    [(loss, _, expected)] = adam_by_hand(made, [0.01])
    learner = train(made, tmp_path)
    assert learner.curve[0]["loss"] == pytest.approx(loss, rel=1e-6)
    for name, p in weights(learner).items():
        torch.testing.assert_close(p, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_all_weights_are_trained(unbroken: Path) -> None:
    start, end = weights(mini()), weights(Learner.from_pretrained(unbroken))
    assert not [name for name in start if torch.equal(start[name], end[name])]


def test_pairs_stand_one_behind_the_other() -> None:
    x, y = torch.arange(1.0, 13).reshape(2, 3, 2), torch.arange(20.0, 26).reshape(2, 3)
    expected = [[1.0, 2.0], [20.0, 0.0], [3.0, 4.0], [21.0, 0.0], [5.0, 6.0], [22.0, 0.0]]
    assert interleaved(x, y)[0].tolist() == expected


def test_the_loss_goes_down(tmp_path: Path) -> None:
    made = config(d=1, points=4, steps=200, batch=32, warmup=20, decay=0.5, check=50)
    learner = train(made, tmp_path)
    errors = [point["error"] for point in learner.curve]
    assert errors[-1] < 0.7 * errors[0] < 0.7 * made.family.variance * 1.2
    behind = errors_by_examples(learner, 256, seed=9)  # on functions it was never measured on
    assert float(behind[-1]) < 0.6 * float(behind[0])


def test_training_leaves_torchs_own_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(config(), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


# --- its data --------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_seed_and_the_step_alone() -> None:
    x, y = batch(config(), 3)
    torch.manual_seed(5)
    for same in (config(), config(lr=0.5, steps=99, layers=1, name="other")):
        again = batch(same, 3)
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
    for other in (batch(config(), 2), batch(config(seed=1), 3)):
        assert not torch.equal(x, other[0])
        assert not torch.equal(y, other[1])


def test_a_batch_has_the_configurations_shape() -> None:
    x, y = batch(config(d=3, points=4), 0)
    assert (x.shape, y.shape) == ((4, 4, 3), (4, 4))


def test_every_prompt_has_its_own_function() -> None:
    x, y = batch(config(points=4), 0)
    w = torch.stack([torch.linalg.lstsq(a, b[:, None]).solution[:, 0] for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close((x * w[:, None]).sum(-1), y, atol=1e-4, rtol=1e-3)
    assert len({round(one, 4) for one in w[:, 0].tolist()}) == 4


def test_dimensions_beyond_the_curriculum_are_zero_and_so_is_their_part_of_the_value() -> None:
    plan = {"every": 2, "d": 1, "points": 2, "d_by": 1, "points_by": 1}
    made = LearnerConfig.model_validate(config(d=3, points=4).model_dump() | {"curriculum": plan})
    for step, (d, n) in enumerate([(1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4), (3, 4)]):
        x, y = batch(made, step)
        assert x.shape[1] == n
        assert bool((x[:, :, :d] != 0).all())
        assert not x[:, :, d:].any()
        if d == 1:  # the value is the first weight's part alone
            torch.testing.assert_close(y[:, 0] / x[:, 0, 0], y[:, 1] / x[:, 1, 0])


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_killed_training_goes_on_with_the_same_bits(
    at: int, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, monkeypatch, at)
    learner = train(config(), tmp_path, resume=True)
    assert_as_unbroken(tmp_path, unbroken)
    assert [point["step"] for point in learner.curve] == [2, 4, 6]
    assert learner.curve == Learner.from_pretrained(unbroken).curve


def test_a_resumed_training_does_no_step_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, monkeypatch, 5)
    dies_at(monkeypatch, 3)  # step 4's checkpoint is behind it
    assert len(train(config(), tmp_path, resume=True).curve) == 3


def test_a_whole_training_resumed_is_as_it_was(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(), tmp_path)
    monkeypatch.setattr(training, "_step", None)  # no step may be taken
    train(config(), tmp_path, resume=True)
    assert_as_unbroken(tmp_path, unbroken)


def test_killed_between_log_and_checkpoint_no_point_comes_twice(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Checkpoint.save

    def mortal(self: Checkpoint, trained: Any, optimizer: Any, place: Any) -> None:
        if place[0] == 4:
            raise Killed
        real(self, trained, optimizer, place)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", mortal)
        with pytest.raises(Killed):
            train(config(), tmp_path)
    train(config(), tmp_path, resume=True)
    assert_as_unbroken(tmp_path, unbroken)


def test_a_training_killed_before_its_end_leaves_the_learner_of_its_last_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, monkeypatch, 5)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, LOG, *LEARNER}
    tensors = load_file(tmp_path / CHECKPOINT)
    assert_same(weights(Learner.from_pretrained(tmp_path)), {k: tensors[f"now.{k}"] for k in weights(mini())})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_resume_a_begun_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(killed(tmp_path, monkeypatch, 3))
    with pytest.raises(InputError, match=f"{tmp_path} holds a training; pass --resume"):
        train(config(), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [{"lr": 0.02}, {"seed": 1}, {"steps": 8}, {"width": 8}, {"function": "tree"}])
def test_a_checkpoint_of_another_configuration_is_refused(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(killed(tmp_path, monkeypatch, 3))
    with pytest.raises(InputError, match="a checkpoint of this very fit"):
        train(config(**change), tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = killed(tmp_path, monkeypatch, 3) / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="a checkpoint that can be read"):
        train(config(), tmp_path, resume=True)


# --- divergence ------------------------------------------------------------------------------------------------------


def test_a_huge_rate_diverges_and_says_so(tmp_path: Path) -> None:
    made = config(lr=1e30, clip=1e9)
    with pytest.raises(InputError, match="a loss that stays bounded; found it diverged at step 2 of mini"):
        train(made, tmp_path)
    assert not list(tmp_path.iterdir())


def spoilt(monkeypatch: pytest.MonkeyPatch, at: int, spoil: Callable[[Learner, float], float]) -> None:
    """What step `at` leaves is spoilt."""
    real = training._step

    def step(learner: Learner, optimizer: Any, number: int) -> float:
        loss = float(real(learner, optimizer, number))
        return spoil(learner, loss) if number == at else loss

    monkeypatch.setattr(training, "_step", step)


def nan_loss(learner: Learner, loss: float) -> float:
    return float("nan")


def infinite_loss(learner: Learner, loss: float) -> float:
    return float("inf")


def nan_weights(learner: Learner, loss: float) -> float:
    """The loss was measured before the step that spoilt the weights."""
    torch.nn.init.constant_(learner.model.lm_head.weight, float("nan"))
    return loss


def blown_weights(learner: Learner, loss: float) -> float:
    """Finite, and useless."""
    torch.nn.init.constant_(learner.model.lm_head.weight, 1e6)
    return loss


@pytest.mark.parametrize("spoil", [nan_loss, infinite_loss, nan_weights, blown_weights])
def test_what_a_diverged_training_leaves_is_the_last_good_checkpoint(
    spoil: Callable[[Learner, float], float], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = load_file(killed(tmp_path / "good", monkeypatch, 4) / CHECKPOINT)
    folder = tmp_path / "bad"
    with monkeypatch.context() as patch:
        spoilt(patch, 5, spoil)
        with pytest.raises(InputError, match=f"diverged at step 6 of mini; the learner of step 4 is kept in {folder}"):
            train(config(), folder)
    assert_same(load_file(folder / CHECKPOINT), good)
    assert Learner.from_pretrained(folder).curve[-1]["step"] == 4
    train(config(), folder, resume=True)
    assert_as_unbroken(folder, unbroken)


# --- failed writes ---------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int) -> None:
    """Half of the file is written and no more, once it was written `after` times."""
    real, seen = Path.write_bytes, list[str]()

    def write_bytes(self: Path, data: Any) -> int:
        if self.name == name:
            seen.append(name)
            if len(seen) > after:
                real(self, data[: len(data) // 2])
                raise OSError("the disk is full")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    monkeypatch.setattr(Path, "write_text", lambda self, text, *_, **__: write_bytes(self, text.encode()))


@pytest.mark.parametrize(
    ("name", "after", "left"),
    [
        (CHECKPOINT, 0, {LOG}),
        (CHECKPOINT, 1, {LOG, CHECKPOINT, *LEARNER}),
        (LOG, 1, {LOG, CHECKPOINT, *LEARNER}),
        ("learner.safetensors", 0, {LOG, CHECKPOINT}),
        ("curve.json", 0, {LOG, CHECKPOINT, "learner.safetensors"}),
        ("learner.json", 0, {LOG, CHECKPOINT, "learner.safetensors", "curve.json"}),
    ],
)
def test_no_half_written_file_is_left_and_training_goes_on(
    name: str, after: int, left: set[str], unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch, name, after=after)
        with pytest.raises(OSError, match="full"):
            train(config(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == left
    assert isinstance(json.loads((tmp_path / LOG).read_text()), list)
    if CHECKPOINT in left:
        assert load_file(tmp_path / CHECKPOINT)
    train(config(), tmp_path, resume=True)
    assert_as_unbroken(tmp_path, unbroken)


# --- errors by the number of examples --------------------------------------------------------------------------------


def held_out(monkeypatch: pytest.MonkeyPatch, measure: Callable[[], object]) -> list[tuple[Tensor, Tensor]]:
    """The points and values that something measures predictions on."""
    seen, real = list[tuple[Tensor, Tensor]](), training.predictions

    def watched(learner: Learner, x: Tensor, y: Tensor) -> Tensor:
        seen.append((x, y))
        return torch.as_tensor(real(learner, x, y))

    with monkeypatch.context() as patch:
        patch.setattr(training, "predictions", watched)
        measure()
    return seen


def test_errors_by_examples_are_those_of_each_prefix_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, measured = mini(seed=3), list[Tensor]()
    [(x, y)] = held_out(monkeypatch, lambda: measured.append(errors_by_examples(learner, 20, seed=1, points=4)))
    for k in range(4):
        alone = learner.predict([learner.points(a[:k], b[:k], a[k]) for a, b in zip(x, y, strict=True)])
        expected = sum((p - t) ** 2 for p, t in zip(alone.tolist(), y[:, k].tolist(), strict=True)) / 20
        assert float(measured[0][k]) == pytest.approx(expected, rel=1e-4)


def test_a_prediction_sees_only_the_pairs_before_it() -> None:
    learner = mini()
    x, y = (torch.randn(3, 4, *more, generator=torch.Generator().manual_seed(4)) for more in ((2,), ()))
    before = predictions(learner, x, y)
    for i in range(4):
        later = torch.arange(4) >= i
        other = predictions(learner, x + 9.0 * (later & (torch.arange(4) > i))[:, None], y + 9.0 * later)
        torch.testing.assert_close(before[:, : i + 1], other[:, : i + 1])
        if i < 3:
            assert not torch.allclose(before[:, i + 1 :], other[:, i + 1 :])


def test_the_error_of_predicting_zero_is_the_variance() -> None:
    learner = mini(function="tree")
    torch.nn.init.zeros_(learner.model.lm_head.weight)
    found = errors_by_examples(learner, 4000, seed=0)
    torch.testing.assert_close(found, torch.ones(3), atol=0.15, rtol=0)


def test_errors_depend_on_their_seed_and_have_the_trained_points() -> None:
    learner = mini()
    one, same, other = (errors_by_examples(learner, 8, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (3,)


def test_the_curve_holds_the_last_error_on_held_out_functions(unbroken: Path) -> None:
    learner = Learner.from_pretrained(unbroken)
    expected = errors_by_examples(learner, training.HELD_OUT, seed=0)[-1]
    assert learner.curve[-1]["error"] == float(expected)
    assert [point["step"] for point in learner.curve] == [2, 4, 6]


def test_held_out_functions_are_not_those_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    [(x, _)] = held_out(monkeypatch, lambda: errors_by_examples(mini(), 4, seed=0))
    trained = torch.cat([batch(config(), step)[0].flatten() for step in range(6)])
    assert not set(trained.tolist()) & set(x.flatten().tolist())


# --- a learner's folder ----------------------------------------------------------------------------------------------


def test_a_learner_comes_back_bit_for_bit(tmp_path: Path) -> None:
    curve = [{"step": 2.0, "loss": 0.1 + 0.2, "error": 1e-17}]
    made = config(function="sparse-linear", sparsity=1, seed=4)
    learner = Learner(make_model(made), made, curve=curve)
    learner.save_pretrained(tmp_path / "new" / "folder")
    again = Learner.from_pretrained(tmp_path / "new" / "folder")
    assert_same(weights(learner), weights(again))
    assert (again.settings, again.curve, again.id) == (made, tuple(curve), "learner:mini")
    x, y = batch(made, 0)
    assert torch.equal(predictions(learner, x, y), predictions(again, x, y))
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == set(LEARNER)


def test_what_training_returns_is_what_it_wrote(tmp_path: Path) -> None:
    learner, again = train(config(), tmp_path), Learner.from_pretrained(tmp_path)
    assert_same(weights(learner), weights(again))
    assert (learner.curve, learner.settings) == (again.curve, again.settings)
    assert not learner.model.training


def test_untrained_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = weights(mini())
    torch.manual_seed(2)
    assert_same(one, weights(mini()))
    other = weights(mini(seed=1))
    matrices = [name for name in one if name.endswith("weight") and "ln" not in name]
    assert not [name for name in matrices if torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    "change",
    [{"width": 8}, {"layers": 1}, {"d": 3}, {"positions": 6}, {"function": "sparse-linear"}, {"seed": 1}],
    ids=str,
)
def test_weights_of_another_configuration_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    mini().save_pretrained(tmp_path)
    (tmp_path / "learner.json").write_text(config(**change).model_dump_json())
    with pytest.raises(VectorMismatch, match="the weights of the learner mini"):
        Learner.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_weights_that_cannot_be_read_are_refused(content: bytes | None, tmp_path: Path) -> None:
    mini().save_pretrained(tmp_path)
    path = tmp_path / "learner.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UnknownName, match="a learner's weights in"):
        Learner.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("learner.json", "{"), ("curve.json", "["), ("curve.json", None)])
def test_json_that_cannot_be_read_is_named(name: str, content: str | None, tmp_path: Path) -> None:
    mini().save_pretrained(tmp_path)
    path = tmp_path / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=f"JSON in {path}"):
        Learner.from_pretrained(tmp_path)


def test_a_bad_key_of_a_learners_folder_is_named(tmp_path: Path) -> None:
    mini().save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "learner.json").read_text()) | {"head": 2}
    (tmp_path / "learner.json").write_text(json.dumps(plain))
    with pytest.raises(UnknownName, match=r"found 'head'; did you mean heads\?"):
        Learner.from_pretrained(tmp_path)


def test_an_unknown_learner_names_the_shipped_ones(tmp_path: Path) -> None:
    assert shipped()
    for unknown in ("linear-d33", str(tmp_path)):
        with pytest.raises(UnknownName, match=f"name one of: {', '.join(shipped())}$"):
            Learner.from_pretrained(unknown)


def test_a_learner_without_its_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    mini().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a training"):
        train(config(), tmp_path)


def test_a_file_in_the_folders_place_is_refused_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="a folder for the learner"):
        train(config(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("points", [0, 6])
def test_errors_are_measured_at_the_positions_there_are(points: int) -> None:
    with pytest.raises(InputError, match="1 to 5 points"):
        errors_by_examples(mini(), 4, seed=0, points=points)


def test_a_learners_name_may_be_of_any_length() -> None:
    with pytest.raises(UnknownName, match="a shipped learner"):
        Learner.from_pretrained("x" * 300)
