"""Sets read through the package `datasets`, which fetches them: DBPedia, the one the offline classification sets lack,
and the twenty-five sets of the adaptive paper (suite `adaptive-hub`).

Rows are those of the named split, cut into splits of our own like all data. Ids and columns are those the sets are
commonly loaded by; the adaptive paper's could not be fetched where this was written. A column that is not there is a
`DataError` that names it.
"""

import random
from collections.abc import Iterable

from taskvec.errors import DataError, MissingPackage
from taskvec.prompts import Example
from taskvec.tasks.hub_sets import HUB, HubSet, Row

ROWS = 4000


def read_hub(name: str) -> list[Example]:
    """Up to `ROWS` examples. Raises `MissingPackage` without `datasets`, `DataError` where it cannot be fetched or its
    rows are not what is expected."""
    found = HUB[name]
    try:
        import datasets
    except ImportError:
        raise MissingPackage(
            f"the package datasets, to fetch {name}", "it is not installed", "run: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(found.id, found.config, split=found.split, revision=found.revision)
    except Exception as error:  # it has no base class for what goes wrong on the way
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{found.id}, from the Hub", why, "connect to a network, or leave it out") from None
    examples = list(_distinct(name, found, rows).values())
    random.Random(f"rows of {name}").shuffle(examples)
    return examples[:ROWS]


def _distinct(name: str, found: HubSet, rows: Iterable[Row]) -> dict[str, Example]:
    """The first row of each input, blanks as one, without rows of no input or a label it does not have."""
    out: dict[str, Example] = {}
    for number, row in enumerate(rows):
        try:
            pair = found.read(row)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            why = f"row {number}: {type(error).__name__} {error}"
            raise DataError(
                f"the columns of {found.id} as {name} reads them", why, "leave it out, and report it"
            ) from None
        words = " ".join(pair[0].split()) if pair is not None else ""
        if pair is not None and words and pair[1] in found.labels:
            out.setdefault(words, Example(words, pair[1]))
    return out
