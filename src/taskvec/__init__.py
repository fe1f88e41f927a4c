"""taskvec: compile few-shot prompts into in-context task vectors, and prove what they keep.

>>> from taskvec import LM, LearnedTaskVector, Task, inject            # doctest: +SKIP
>>> lm, task = LM.load("smollm2-135m"), Task.from_jsonl("past_tense")  # doctest: +SKIP
>>> vector = LearnedTaskVector().fit(lm, task.train, task.dev)         # doctest: +SKIP
>>> with inject(lm, vector):                                           # doctest: +SKIP
...     lm.generate("Q: walk\\nA:")

Importing taskvec loads neither torch nor transformers: each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec import methods
    from taskvec.comparison import compare
    from taskvec.errors import TaskvecError
    from taskvec.evaluate import score
    from taskvec.hooks import capture, inject
    from taskvec.lm import LM
    from taskvec.methods.hendel import HendelTaskVector
    from taskvec.methods.learned import LearnedTaskVector
    from taskvec.methods.linear import LinearTaskVector
    from taskvec.methods.mean_difference import MeanDifference
    from taskvec.prompts import Example, PromptFormat
    from taskvec.results import Results
    from taskvec.sites import Site
    from taskvec.tasks import Task
    from taskvec.vector import Add, AddKeepNorm, Affine, Blend, Edit, Replace, TaskVector, Where

_HOMES = {
    "comparison": ("compare",),
    "errors": ("TaskvecError",),
    "evaluate": ("score",),
    "hooks": ("capture", "inject"),
    "lm": ("LM",),
    "methods.hendel": ("HendelTaskVector",),
    "methods.learned": ("LearnedTaskVector",),
    "methods.linear": ("LinearTaskVector",),
    "methods.mean_difference": ("MeanDifference",),
    "prompts": ("Example", "PromptFormat"),
    "results": ("Results",),
    "sites": ("Site",),
    "tasks": ("Task",),
    "vector": ("Add", "AddKeepNorm", "Affine", "Blend", "Edit", "Replace", "TaskVector", "Where"),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Add",
    "AddKeepNorm",
    "Affine",
    "Blend",
    "Edit",
    "Example",
    "HendelTaskVector",
    "LM",
    "LearnedTaskVector",
    "LinearTaskVector",
    "MeanDifference",
    "PromptFormat",
    "Replace",
    "Results",
    "Site",
    "Task",
    "TaskVector",
    "TaskvecError",
    "Where",
    "capture",
    "compare",
    "inject",
    "methods",
    "score",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("taskvec.methods")
    if name not in _NAMES:
        raise AttributeError(f"module 'taskvec' has no attribute {name!r}")
    return getattr(import_module(f"taskvec.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
