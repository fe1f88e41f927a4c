"""Every error taskvec raises on purpose, as one tree.

::

    TaskvecError
    ├── InputError            what was given cannot be used: a file, an argument, a template
    │   ├── DataError         a task file, or too few examples in it
    │   ├── UnknownName       no model, method, format, task or site of that name
    │   └── PromptTooLong     a prompt does not fit into the model's context
    ├── ModelError            the model cannot do what was asked of it
    │   ├── MissingSite       this family has no such site, or it is not what its name says
    │   └── MissingPackage    an optional package is not installed
    ├── VectorError           a task vector cannot be used here
    │   ├── VectorMismatch    it was made for another model, width or template
    │   └── VectorCorrupt     its files are not what was saved
    └── UnfiredEdit           an edit was injected and never reached a token

Each message is one line that says what was wanted, what was found and what to do. The command line prints it and exits
with 2; any other exception is our bug and exits with 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TaskvecError(Exception):
    """Base class. `wanted`, `found` and `do` are sentence parts; the message joins them in one line."""

    def __init__(self, wanted: str, found: str, do: str) -> None:
        self.wanted, self.found, self.do = wanted, found, do
        super().__init__(" ".join(f"wanted {wanted}; found {found}; {do}".split()))


class InputError(TaskvecError, ValueError):
    """What the caller gave cannot be used."""


class DataError(InputError):
    """A task file is malformed or too small."""


class UnknownName(InputError):
    """A name that taskvec does not know."""


def unknown(wanted: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that is not among the `known` ones: it names the nearest, and all."""
    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return UnknownName(wanted, repr(name), f"{hint}name one of: {', '.join(known)}")


class PromptTooLong(InputError):
    """A prompt has more tokens than the model's context."""


class ModelError(TaskvecError):
    """The model cannot take part."""


class MissingSite(ModelError):
    """The model's family has no such site, or the site failed its proof."""


class MissingPackage(ModelError, ImportError):
    """An optional package is needed and not installed."""


class VectorError(TaskvecError):
    """A task vector cannot be used here."""


class VectorMismatch(VectorError):
    """The vector belongs to another model, width or prompt template."""


class VectorCorrupt(VectorError):
    """The vector's folder is incomplete or was changed after it was saved."""


class UnfiredEdit(TaskvecError):
    """An injected edit never reached a token: nothing was changed, so nothing may be reported."""
