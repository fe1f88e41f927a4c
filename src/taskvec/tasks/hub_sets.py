"""What the Hub's sets are called, where they are, and how their rows are read.

DBPedia's template and labels are those of the Linear TV paper (arXiv 2605.20730, appendix). The adaptive paper's sets
(arXiv 2506.03426) are read from splits whose labels are public: its own code takes three GLUE test splits, where the
label is a constant. Choices stand behind the question as (A), (B), ...; the answer is the letter.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQR"
PARQUET = "refs/convert/parquet"
"""Where the Hub keeps the rows of sets whose own files are code."""
Row = Mapping[str, Any]
Read = Callable[[Row], tuple[str, str] | None]
"""A row's input and output; None leaves it out."""


@dataclass(frozen=True)
class HubSet:
    """One set: its Hub id, configuration, split and revision, how a row is read, its labels, what it is, its category
    in reports, and its template (None: qa)."""

    id: str
    config: str | None
    split: str
    read: Read
    labels: tuple[str, ...]
    about: str
    category: str = "Hub"
    format: str | None = None
    revision: str = "main"


def _labelled(names: Sequence[str], *columns: str, label: str = "label") -> Read:
    """Columns one after another (`name: ` before each where there are several), and the name of a label's number."""

    def read(row: Row) -> tuple[str, str] | None:
        parts = [str(row[name]) if len(columns) == 1 else f"{name}: {row[name]}" for name in columns]
        number = int(row[label])
        return (" ".join(parts), names[number]) if 0 <= number < len(names) else None

    return read


def _chosen(question: str, options: Callable[[Row], Sequence[str]], answer: Callable[[Row], int]) -> Read:
    """A question with its options, and the letter of the right one."""

    def read(row: Row) -> tuple[str, str]:
        return _asked(str(row[question]), options(row)), LETTERS[answer(row)]

    return read


def _asked(question: str, options: Sequence[str]) -> str:
    return " ".join([question, *(f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))])


def _keyed(row: Row) -> int:
    """The place of `answerKey` among the labels of `choices`."""
    return list(row["choices"]["label"]).index(row["answerKey"])


def _texts(row: Row) -> Sequence[str]:
    return list(row["choices"]["text"])


def _bbh(row: Row) -> tuple[str, str]:
    """BIG-Bench Hard: an answer is a word, or a letter in brackets."""
    return str(row["input"]), str(row["target"]).strip("() ")


def _bbq(row: Row) -> tuple[str, str]:
    question = f"{row['context']} {row['question']}"
    return _asked(question, [row["ans0"], row["ans1"], row["ans2"]]), LETTERS[int(row["label"])]


def _crows(row: Row) -> tuple[str, str]:
    """Which sentence is the stereotype? They stand in an order that their own text decides."""
    pair = [str(row["sent_more"]), str(row["sent_less"])]
    turned = hashlib.sha256("\n".join(pair).encode()).digest()[0] % 2
    options = pair[::-1] if turned else pair
    return _asked("Which sentence is a stereotype?", options), LETTERS[turned]


def _math_qa(row: Row) -> tuple[str, str]:
    """The options are one text: `a ) 38 , b ) 27.675 , ...`."""
    return f"{row['Problem']} {row['options']}", str(row["correct"]).upper()


def _mmlu_pro_math(row: Row) -> tuple[str, str] | None:
    if row["category"] != "math":
        return None
    return _asked(str(row["question"]), row["options"]), str(row["answer"])


def _aqua(row: Row) -> tuple[str, str]:
    return _asked(str(row["question"]), [str(text).partition(")")[2] for text in row["options"]]), str(row["correct"])


def _boolq(row: Row) -> tuple[str, str]:
    return f"{row['passage']} {row['question']}?", str(bool(row["answer"]))


_TRUTH = ("True", "False")
_DBPEDIA = (
    *("company", "school", "artist", "athlete", "politics", "transportation", "building"),
    *("nature", "village", "animal", "plant", "album", "film", "book"),
)


def _choices(n: int) -> tuple[str, ...]:
    return tuple(LETTERS[:n])


def _one(place: tuple[str, str | None, str], read: Read, choices: int, about: str, category: str) -> HubSet:
    """A set of multiple choice; `place` is its id, configuration and split."""
    return HubSet(*place, read, _choices(choices), about, category)


def _subset(name: str, labels: tuple[str, ...]) -> HubSet:
    about = f"BIG-Bench Hard, {name.replace('_', ' ')}"
    return HubSet("lukaemon/bbh", name, "test", _bbh, labels, about, "Reasoning", revision=PARQUET)


def _glue(name: str, split: str, names: Sequence[str], *columns: str, about: str) -> HubSet:
    return HubSet("nyu-mll/glue", name, split, _labelled(names, *columns), tuple(dict.fromkeys(names)), about, "NLU")


_SUPERGLUE, _ETHICS, _BBQ = "aps/super_glue", "EleutherAI/hendrycks_ethics", "oskarvanderwal/bbq"
_QUESTION = _chosen("question", _texts, _keyed)
_STEM = _chosen("question_stem", _texts, _keyed)
_ENDINGS = _chosen("ctx", lambda row: row["endings"], lambda row: int(row["label"]))
_LISTED = _chosen("question", lambda row: row["choices"], lambda row: int(row["answer"]))
_FAIR, _RIGHT = ("unreasonable", "reasonable"), ("fine", "wrong")
_JUSTICE, _COMMONSENSE = _labelled(_FAIR, "scenario"), _labelled(_RIGHT, "input")
_RTE, _WIC = _labelled(_TRUTH, "premise", "hypothesis"), _labelled(_TRUTH[::-1], "word", "sentence1", "sentence2")
_INPUT = "Input: {input}\nLabel: {output}\n"
_TOPIC = _labelled(_DBPEDIA, "content")
_PSYCHOLOGY = ("cais/mmlu", "high_school_psychology", "test")
HUB = {
    "dbpedia": HubSet(
        *("fancyzhx/dbpedia_14", None, "test", _TOPIC, _DBPEDIA, "DBPedia ontology"),
        format=_INPUT,
        revision="9abd46cf7fc8b4c64290f26993c540b92aa145ac",
    ),
    "commonsense_qa": _one(("tau/commonsense_qa", None, "train"), _QUESTION, 5, "CommonsenseQA", "Knowledge"),
    "openbookqa": _one(("allenai/openbookqa", "main", "train"), _STEM, 4, "OpenBookQA", "Knowledge"),
    "hellaswag": _one(("Rowan/hellaswag", None, "validation"), _ENDINGS, 4, "HellaSwag", "Knowledge"),
    "boolq": HubSet("google/boolq", None, "validation", _boolq, _TRUTH, "BoolQ", "Knowledge"),
    "bbh_boolean_expressions": _subset("boolean_expressions", _TRUTH),
    "bbh_date_understanding": _subset("date_understanding", _choices(6)),
    "bbh_reasoning_about_colored_objects": _subset("reasoning_about_colored_objects", _choices(18)),
    "bbh_temporal_sequences": _subset("temporal_sequences", _choices(4)),
    "arc_challenge": _one(("allenai/ai2_arc", "ARC-Challenge", "train"), _QUESTION, 5, "ARC, challenge", "Reasoning"),
    "math_qa": _one(("swiss-ai/math_qa", None, "validation"), _math_qa, 5, "MathQA", "Math"),
    "mmlu_pro_math": _one(("TIGER-Lab/MMLU-Pro", None, "test"), _mmlu_pro_math, 10, "MMLU-Pro, mathematics", "Math"),
    "crows_pairs": _one(("jannalu/crows_pairs_multilingual", "english", "test"), _crows, 2, "CrowS-Pairs", "Safety"),
    "bbq_age": _one((_BBQ, "Age", "test"), _bbq, 3, "BBQ, age", "Safety"),
    "ethics_justice": HubSet(
        _ETHICS, "justice", "test", _JUSTICE, _FAIR, "ETHICS, justice", "Safety", revision=PARQUET
    ),
    "ethics_commonsense": HubSet(
        _ETHICS, "commonsense", "test", _COMMONSENSE, _RIGHT, "ETHICS, commonsense", "Safety", revision=PARQUET
    ),
    "superglue_rte": HubSet(_SUPERGLUE, "rte", "train", _RTE, _TRUTH, "RTE", "NLU", revision=PARQUET),
    "superglue_wic": HubSet(_SUPERGLUE, "wic", "train", _WIC, _TRUTH, "WiC", "NLU", revision=PARQUET),
    "glue_qnli": _glue("qnli", "validation", _TRUTH, "question", "sentence", about="QNLI"),
    "glue_sst2": _glue("sst2", "validation", ("negative", "positive"), "sentence", about="SST-2 of GLUE"),
    "glue_mnli": _glue(
        "mnli", "validation_matched", ("True", "Neither", "False"), "premise", "hypothesis", about="MNLI, matched"
    ),
    "glue_cola": _glue("cola", "validation", ("unacceptable", "acceptable"), "sentence", about="CoLA"),
    "bbq_religion": _one((_BBQ, "Religion", "test"), _bbq, 3, "BBQ, religion", "Safety"),
    "aqua_rat": _one(("deepmind/aqua_rat", "raw", "test"), _aqua, 5, "AQuA-RAT", "Math"),
    "mmlu_high_school_psychology": _one(_PSYCHOLOGY, _LISTED, 4, "MMLU, psychology", "Knowledge"),
    "bbh_logical_deduction_five_objects": _subset("logical_deduction_five_objects", _choices(5)),
}
