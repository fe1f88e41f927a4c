"""Every method by name. Names are listed without importing a method; a third party adds one through an entry point.

A method is a frozen dataclass of hyper-parameters with a class variable `name` and `fit`. A package registers its own
with

    [project.entry-points."taskvec.methods"]
    my-method = "my_package.my_module:MyMethod"
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args, get_type_hints, runtime_checkable

from taskvec.errors import InputError, unknown

if TYPE_CHECKING:
    from taskvec.evaluate import Condition
    from taskvec.lm import LM
    from taskvec.tasks import Dev, Train
    from taskvec.vector import TaskVector, VectorSource

METHODS = {
    "zero-shot": "taskvec.methods.prompted:ZeroShot",
    "few-shot": "taskvec.methods.prompted:FewShot",
    "mean-difference": "taskvec.methods.mean_difference:MeanDifference",
    "hendel": "taskvec.methods.hendel:HendelTaskVector",
    "linear": "taskvec.methods.linear:LinearTaskVector",
    "learned": "taskvec.methods.learned:LearnedTaskVector",
    "function-vector": "taskvec.methods.function_vector:FunctionVector",
    "learnable": "taskvec.methods.learnable:LearnableTaskVector",
    "state-vector": "taskvec.methods.state_vector:StateVector",
    "i2cl": "taskvec.methods.i2cl:I2CL",
    "icv": "taskvec.methods.icv:InContextVector",
    "elicit": "taskvec.methods.elicit:Elicit",
    "adaptive": "taskvec.methods.adaptive:AdaptiveTaskVector",
    "adaptive-ridge": "taskvec.methods.adaptive_ridge:AdaptiveRidge",
    "lora": "taskvec.methods.lora:LoRA",
    "prefix-tuning": "taskvec.methods.prefix_tuning:PrefixTuning",
    "prompt-tuning": "taskvec.methods.prompt_tuning:PromptTuning",
    "linear-probe": "taskvec.methods.linear_probe:LinearProbe",
    "calibration": "taskvec.methods.calibration:Calibration",
}
MARKS = {"elicit": "taskvec_library.json", "adaptive": "taskvec_adaptive.json"}
"""The file by which a method's saved source is known."""
CONTROLS = ("zero-shot", "few-shot", "mean-difference", "random")
"""What stands in every table. `random` is no method: it is made from the vector it is matched to."""


@runtime_checkable
class Method(Protocol):
    """Hyper-parameters and `fit`. The dataclass fields are the documentation, the provenance and the options."""

    name: ClassVar[str]

    def fit(
        self, lm: "LM", train: "Train | Sequence[Train]", dev: "Dev | Sequence[Dev]", *, seed: int = 0
    ) -> "Condition":
        """Fit on train, choose on dev, of one task or of many: a vector, a vector source, or an adapted rival."""
        ...


def names() -> list[str]:
    """All methods' names, those of third parties last."""
    return [*METHODS, *sorted(entry.name for entry in _entries() if entry.name not in METHODS)]


def get(name: str) -> type[Any]:
    """The class of a method. Raises `UnknownName`."""
    target = METHODS.get(name) or next((entry.value for entry in _entries() if entry.name == name), None)
    if target is None:
        raise unknown("a method", name, [*names(), "random"])
    module, _, attribute = target.partition(":")
    method: type[Any] = getattr(import_module(module), attribute)
    return method


def facts(name: str) -> dict[str, Any]:
    """What a method is, as plain JSON values: its name, paper, default sites and ops; whether it needs a task with
    labels, and gradients. What a third party's method does not say is None."""
    method = None if name == "random" else get(name)
    if method is None:
        return {
            "name": name,
            "paper": None,
            "sites": [],
            "ops": ["add"],
            "needs_labels": False,
            "needs_gradients": False,
        }
    said = {key: getattr(method, key, None) for key in ("cites", "sites", "ops", "needs_labels", "needs_gradients")}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in said.items()}
    return {"name": name, "paper": plain.pop("cites"), **plain}


def load(folder: "str | Path") -> "TaskVector | VectorSource":
    """What was saved in a folder: a vector, or a source of some method (it has a file that names the method)."""
    from taskvec.vector import TaskVector

    for name, mark in MARKS.items():
        if (Path(folder) / mark).is_file():
            return get(name).source.from_pretrained(folder)  # type: ignore[no-any-return]
    return TaskVector.from_pretrained(folder)


def make(name: str, settings: dict[str, str] | None = None) -> Method:
    """A method with some of its fields set from text, as `--set METHOD.FIELD=VALUE` gives them.

    >>> make("learned", {"layer": "12"}).layer
    12
    """
    method = get(name)
    hints = get_type_hints(method)
    known: dict[str, Any] = {f.name: hints[f.name] for f in fields(method) if f.init} if is_dataclass(method) else {}
    values: dict[str, Any] = {}
    for field_name, text in (settings or {}).items():
        if field_name not in known:
            raise InputError(f"a field of {name}: {', '.join(known) or 'it has none'}", repr(field_name), "mend --set")
        values[field_name] = _parsed(text, known[field_name], f"{name}.{field_name}")
    made: Method = method(**values)
    return made


def make_all(
    names: Sequence[str],
    settings: Mapping[str, dict[str, str]],
    preset: Mapping[str, dict[str, str]] = MappingProxyType({}),
) -> list[Method]:
    """The methods of these names (`random`, which is none, is passed over) and the controls that have settings; a
    preset stands below the settings. Raises `InputError` for settings of anything else."""
    asked = dict.fromkeys([*names, *(name for name in settings if name in CONTROLS)])
    for name in settings:
        if name not in asked or name == "random":
            raise InputError("--set for a method that runs", repr(name), f"add --method {name}")
    return [make(name, preset.get(name, {}) | settings.get(name, {})) for name in asked if name != "random"]


def _entries() -> Any:
    return entry_points(group="taskvec.methods")


def _parsed(text: str, hint: Any, place: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    kinds = get_args(hint) or (hint,)
    if text.lower() in ("none", "null", "") and type(None) in kinds:
        return None
    if hint == tuple[str, ...] and not text.strip():
        return ()
    adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(text)
    except ValidationError as error:
        found = error.errors()[0]["msg"]
    try:  # several values, or one of a field that takes several
        return adapter.validate_python([part.strip() for part in text.split(",")])
    except ValidationError:
        raise InputError(f"a value of type {hint} for {place}", f"{text!r} ({found})", "mend --set") from None
