"""The error tree: one-line messages and the classes that callers catch."""

import pytest

from taskvec import errors
from taskvec.errors import TaskvecError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
TREE = {
    "TaskvecError": "Exception",
    "InputError": "TaskvecError",
    "DataError": "InputError",
    "UnknownName": "InputError",
    "PromptTooLong": "InputError",
    "ModelError": "TaskvecError",
    "MissingSite": "ModelError",
    "MissingPackage": "ModelError",
    "VectorError": "TaskvecError",
    "VectorMismatch": "VectorError",
    "VectorCorrupt": "VectorError",
    "UnfiredEdit": "TaskvecError",
}


def test_the_tree_is_the_one_in_the_docstring() -> None:
    assert {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES} == TREE
    drawn = errors.__doc__ or ""
    assert all(name in drawn for name in TREE)


def test_input_errors_are_value_errors_and_nothing_else_is() -> None:
    assert {cls.__name__ for cls in CLASSES if issubclass(cls, ValueError)} == {
        "InputError",
        "DataError",
        "UnknownName",
        "PromptTooLong",
    }


def test_only_a_missing_package_is_an_import_error() -> None:
    assert [cls.__name__ for cls in CLASSES if issubclass(cls, ImportError)] == ["MissingPackage"]


@pytest.mark.parametrize("cls", CLASSES)
def test_message_is_one_line_of_wanted_found_and_do(cls: type[TaskvecError]) -> None:
    error = cls("a  file\nof text", "two\r\n\tlines\u2028here", "write\none")
    assert str(error) == "wanted a file of text; found two lines here; write one"
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_parts_are_kept_as_given(cls: type[TaskvecError]) -> None:
    error = cls("a\nb", "c", "d")
    assert (error.wanted, error.found, error.do) == ("a\nb", "c", "d")
