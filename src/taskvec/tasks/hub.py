"""Classification sets read through the package `datasets`, which fetches them: DBPedia, the one the offline sets lack.

Rows are those of the named split, cut into splits of our own like all data; template and labels are those of the Linear
TV paper (arXiv 2605.20730, appendix).
"""

import random
from dataclasses import dataclass

from taskvec.errors import DataError, MissingPackage
from taskvec.prompts import Example

ROWS = 4000


@dataclass(frozen=True)
class HubSet:
    """One set: its Hub id and revision, its split and columns, its template, its labels in the order of their
    numbers, and what it is."""

    id: str
    revision: str
    split: str
    columns: tuple[str, str]
    format: str
    labels: tuple[str, ...]
    about: str


HUB = {
    "dbpedia": HubSet(
        "fancyzhx/dbpedia_14",
        "main",
        "test",
        ("content", "label"),
        "Input: {input}\nLabel: {output}\n",
        (
            *("company", "school", "artist", "athlete", "politics", "transportation", "building"),
            *("nature", "village", "animal", "plant", "album", "film", "book"),
        ),
        "DBPedia ontology, test split; fetched from the Hub",
    )
}


def read_hub(name: str) -> list[Example]:
    """Up to `ROWS` examples. Raises `MissingPackage` without `datasets`, `DataError` where it cannot be fetched."""
    found = HUB[name]
    try:
        import datasets
    except ImportError:
        raise MissingPackage(
            f"the package datasets, to fetch {name}", "it is not installed", "run: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(found.id, split=found.split, revision=found.revision)
    except Exception as error:  # it has no base class for what goes wrong on the way
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{found.id}, from the Hub", why, "connect to a network, or leave it out") from None
    text, number = found.columns
    seen: dict[str, str] = {}
    for row in rows:
        words = " ".join(str(row[text]).split())
        if words and 0 <= int(row[number]) < len(found.labels):
            seen.setdefault(words, found.labels[int(row[number])])
    examples = [Example(words, label) for words, label in seen.items()]
    random.Random(f"rows of {name}").shuffle(examples)
    return examples[:ROWS]
