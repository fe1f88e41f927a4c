"""ELICIT (Wang et al., arXiv 2410.09343): a library of task vectors, and retrieval for every query.

**Idea.** Keep task vectors of many tasks. For a query, find the entries whose demonstrations look like it, and inject
their mean, or nothing where none is near enough.

**Formula.** Each task gives `prompts` entries: theta^l = the few-shot state of a dummy query behind demonstrations of
its own. The task's layer is the one where `strength` x the mean of its entries, added to `resid[l]` at the last
prompt token, is best on dev. A query is compared with every entry; among the best `top` whose score reaches the
threshold the commonest layer wins, and the mean of that layer's entries is added with `strength`. The threshold is
the score that `recall` of dev's queries reach with an entry of their own task.

**Where we differ.** Entries are ordinary vector folders, so vectors of any method can stand in a library; entries of
another layer than the commonest drop out of the mean (the paper keeps all layers of each). BM25 compares the query with
the demonstrations' words; `dense` compares directions of last-token states of this model, or of a sentence encoder
named by `encoder`; the paper's trained classifier is not rebuilt. The threshold comes from dev, and stands in `found`.

**Cost.** `prompts` few-shot prompts a task once, and a replay a layer and dev item; a query costs its retrieval.

**When to use it.** When one service answers many tasks and the query's words tell which. On word tasks whose inputs
look alike (a verb is a verb) BM25 has nothing to go by, and mostly nothing is injected.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from taskvec.errors import InputError, MissingPackage
from taskvec.evaluate import Fitting, at_least_one, longest_answer, pick
from taskvec.evaluate.drawing import draw, encode_drawn, labels_read
from taskvec.lm import LM, Encoded
from taskvec.replay import Ask, Trial, replay
from taskvec.sites import Site
from taskvec.tasks import Dev, Train, load_task
from taskvec.vector import Add, Edit, Origin, TaskVector
from taskvec.vector.sealed import Sealed, sha
from taskvec.vector.store import CARD, CONFIG, replacing

Retriever = Literal["bm25", "dense"]
MARK = "taskvec_library.json"


class _Library(Sealed):
    """The file `taskvec_library.json`. `entries` pairs each folder with the SHA-256 of its configuration."""

    mark: ClassVar[str] = MARK
    what: ClassVar[str] = "library"

    method: Literal["elicit"] = "elicit"
    retriever: Retriever
    encoder: str
    threshold: float
    top: int
    origin: Origin


@dataclass(frozen=True, eq=False)
class ElicitLibrary:
    """A vector source: task vectors, and for each query the mean of those that its text retrieves (or None).

    Every entry's origin holds the demonstrations it was made from; their words are what a query is compared with.
    """

    entries: tuple[TaskVector, ...]
    origin: Origin
    threshold: float
    top: int = 10
    retriever: Retriever = "bm25"
    encoder: str = ""
    source: str | None = None
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site an entry edits."""
        return tuple(dict.fromkeys(site for entry in self.entries for site in entry.sites))

    def vectors(self, lm: LM, prompts: Sequence[Encoded]) -> list[TaskVector | None]:
        """The mean of the retrieved entries of the commonest site for each prompt; None where none is near enough."""
        scores = self.scores(lm, [query_text(prompt) for prompt in prompts])
        return [self._written(row) for row in scores]

    def scores(self, lm: LM, queries: Sequence[str]) -> Float[Tensor, "n e"]:
        """How near each query is to each entry's demonstrations."""
        if self.retriever == "bm25":
            return torch.stack([self._bm25_scores(_words(query)) for query in queries])
        centre, entries = self._embedded(lm)
        return _unit(_embed(lm, queries, self.encoder) - centre) @ entries.T

    def _bm25_scores(self, words: Sequence[str]) -> Float[Tensor, " e"]:
        if not words:  # bm25s has no answer to nothing
            return torch.zeros(len(self.entries))
        return torch.from_numpy(self._bm25.get_scores(list(words)))

    def nearest(self, row: Float[Tensor, " e"]) -> list[int]:
        """The best `top` entries that reach the threshold. A score of 0 or below (no word shared) never does."""
        order = row.argsort(descending=True, stable=True)[: self.top].tolist()
        return [i for i in order if float(row[i]) >= self.threshold and float(row[i]) > 0]

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False, card: str | None = None) -> None:
        """Write the library: a vector folder an entry, and one file that lists them. All or nothing."""
        with replacing(Path(folder), overwrite=overwrite, mark=MARK) as new:
            names = [f"{i:04d}" for i in range(len(self.entries))]
            about = card or f"# A library of {len(names)} in-context task vectors (ELICIT)\n"
            for name, entry in zip(names, self.entries, strict=True):
                entry.save_pretrained(new / name)
            record = _Library(
                retriever=self.retriever,
                encoder=self.encoder,
                threshold=self.threshold,
                top=self.top,
                entries={name: sha((new / name / CONFIG).read_bytes()) for name in names},
                files={CARD: sha(about.encode())},
                origin=self.origin,
            )
            record.write(new)
            (new / CARD).write_bytes(about.encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ElicitLibrary":
        """Read a library, checking every entry. Raises `VectorCorrupt` for anything missing, added or changed."""
        folder = Path(folder)
        record = _Library.read(folder)
        for name, digest in record.entries.items():
            if not (folder / name / CONFIG).is_file() or sha((folder / name / CONFIG).read_bytes()) != digest:
                raise _Library.corrupt(folder, f"the entry {name} is not the one that was saved")
        entries = tuple(TaskVector.from_pretrained(folder / name) for name in record.entries)
        return cls(entries, record.origin, record.threshold, record.top, record.retriever, record.encoder, str(folder))

    def _written(self, row: Float[Tensor, " e"]) -> TaskVector | None:
        near = self.nearest(row)
        if not near:
            return None
        ((sites, _),) = Counter(self.entries[i].sites for i in near).most_common(1)
        return TaskVector.mean([self.entries[i] for i in near if self.entries[i].sites == sites])

    @cached_property
    def _texts(self) -> list[str]:
        return [_text(entry) for entry in self.entries]

    @cached_property
    def _bm25(self) -> Any:
        index = _bm25s().BM25()
        index.index([_words(text) for text in self._texts], show_progress=False)
        return index

    def _embedded(self, lm: LM) -> tuple[Tensor, Tensor]:
        if "entries" not in self._known:
            rows = _embed(lm, self._texts, self.encoder)
            self._known["entries"] = rows.mean(0), _unit(rows - rows.mean(0))
        centre, entries = self._known["entries"]
        return centre, entries


def query_text(prompt: Encoded) -> str:
    """The query's own words, without the template; else the whole text."""
    if not prompt.ids:
        raise InputError("prompts of text, to retrieve by", "embeddings", "use another method")
    return (prompt.query or prompt.text).strip()


def _bm25s() -> Any:
    """The package, imported on use."""
    try:
        import bm25s
    except ImportError:
        raise MissingPackage("the package bm25s, for elicit", "it is not installed", "run: pip install bm25s") from None
    return bm25s


def _of_all(entries: Sequence[TaskVector]) -> dict[str, Any]:
    """What a library's origin takes from all of its entries: the data they saw, and the longest answer."""
    origins = [entry.origin for entry in entries if entry.origin is not None]
    also = {data: n for origin in origins for data, n in origin.kept_away.items()}
    also.pop(origins[0].data_hash)
    return {"also": also, "max_new_tokens": max(origin.max_new_tokens for origin in origins)}


def _text(entry: TaskVector) -> str:
    demos = entry.origin.demos if entry.origin is not None else ()
    return "\n".join(f"{demo.input} {demo.output}" for demo in demos)


def _words(text: str) -> list[str]:
    return text.lower().split()


@torch.no_grad()
def _embed(lm: LM, texts: Sequence[str], encoder: str) -> Float[Tensor, "n w"]:
    """Last-token states in the middle of this model, or mean-pooled states of a sentence encoder."""
    if not encoder:
        prompts = [lm.encode(text) for text in texts]
        site = Site("resid", lm.n_layers // 2)
        answers = replay(lm, prompts).answer([Trial(i) for i in range(len(prompts))], Ask(states=(site,)))
        states: Tensor = answers.states[site]
        return states
    tokenizer, model = _sentence_encoder(encoder)
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    pooled: Tensor = (model(**inputs).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    return pooled


@lru_cache(maxsize=1)
def _sentence_encoder(name: str) -> tuple[Any, Any]:
    """A sentence encoder and its tokenizer, by folder or Hub id; held for the next query."""
    from transformers import AutoModel, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            "a sentence encoder that transformers can load", f"elicit.encoder = {name!r} ({why})", "name a folder"
        ) from error


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit


@dataclass(frozen=True)
class Elicit:
    """Fields.

    - `others`: built-in tasks that stand in the library beside those given, under the same format and shots.
    - `prompts`: entries a task (paper: 10); `strength`: what a theta is multiplied with (paper: 2).
    - `top`, `retriever`, `encoder`: see above; `recall`: where the threshold is set on dev (paper: 0.8).
    - `n_dev`: dev items a task.
    """

    name: ClassVar[str] = "elicit"
    cites: ClassVar[str] = "arXiv 2410.09343"
    sites: ClassVar[tuple[str, ...]] = ("resid",)
    ops: ClassVar[tuple[str, ...]] = ("add",)
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    source: ClassVar[type[ElicitLibrary]] = ElicitLibrary
    others: tuple[str, ...] = ("antonym", "capitalize", "country_capital", "english_french")
    prompts: int = 10
    strength: float = 2.0
    top: int = 10
    retriever: Retriever = "bm25"
    encoder: str = ""
    recall: float = 0.8
    n_dev: int = 40

    def fit(self, lm: LM, train: Train | Sequence[Train], dev: Dev | Sequence[Dev], *, seed: int = 0) -> ElicitLibrary:
        """Entries for every task, their layers and the threshold on dev. Takes one task or many."""
        at_least_one(self, "prompts", "top", "n_dev")
        if not 0 < self.recall <= 1:
            raise InputError("a recall above 0 and at most 1", f"elicit.recall = {self.recall}", "mend it")
        self._check_retriever()
        given = self._given(train, dev)
        with Fitting.of(lm, self, given[0][0], seed=seed) as fitting:
            entries, layers = list[TaskVector](), dict[str, int]()
            for one, its_dev in [*given, *self._more(given)]:
                layers[one.spec.name], some = self._entries(fitting, one, its_dev)
                entries += some
            library = ElicitLibrary(tuple(entries), fitting.origin(), 0.0, self.top, self.retriever, self.encoder)
            threshold = self._threshold(lm, library, given)
            found: Mapping[str, Any] = {"layers": layers, "threshold": threshold, "entries": len(entries)}
            origin = fitting.origin(found=found).model_copy(update=_of_all(entries))
            return replace(library, threshold=threshold, origin=origin)

    def _check_retriever(self) -> None:
        if self.retriever == "bm25":
            _bm25s()
        if self.encoder:
            self._check_encoder()

    def _check_encoder(self) -> None:
        if self.retriever != "dense":
            raise InputError(
                "elicit.retriever = dense with an encoder", f"elicit.retriever = {self.retriever}", "set or drop it"
            )
        _sentence_encoder(self.encoder)

    def _given(self, train: Train | Sequence[Train], dev: Dev | Sequence[Dev]) -> list[tuple[Train, Dev]]:
        trains = [train] if isinstance(train, Train) else list(train)
        devs = [dev] if isinstance(dev, Dev) else list(dev)
        if not trains or len(trains) != len(devs):
            raise InputError("a dev split for every train split", f"{len(trains)} and {len(devs)}", "pass both of each")
        if len({one.spec.format.hash for one in trains}) > 1:
            raise InputError("tasks of one format", "several", "give all tasks the same format")
        return list(zip(trains, devs, strict=True))

    def _more(self, given: Sequence[tuple[Train, Dev]]) -> list[tuple[Train, Dev]]:
        spec, names = given[0][0].spec, {one.spec.name for one, _ in given}
        tasks = [load_task(n, format=spec.format, shots=spec.shots) for n in self.others if n not in names]
        return [(task.train, task.dev) for task in tasks]

    def _entries(self, fitting: Fitting, train: Train, dev: Dev) -> tuple[int, list[TaskVector]]:
        """A task's layer and its entries."""
        lm = fitting.lm
        drawn = draw(train, self.prompts, seed=fitting.seed)
        spec = train.spec
        fitting.read |= {f"{spec.data_hash} {text}" for text in labels_read(drawn, queries=False)}
        fitting.queries += len({one.query.input for one in drawn})
        sites = [Site("resid", layer) for layer in range(lm.n_layers)]
        states = fitting.states_of(encode_drawn(lm, train, drawn)[0], sites)
        candidates = [TaskVector((Edit(s, Add(states[s].mean(0)), strength=self.strength),)) for s in sites]
        best, _ = pick(fitting, dev, candidates, self.n_dev)
        of_task = {"task": spec.name, "data_hash": spec.data_hash, "n_test": spec.n_test, "labels": spec.labels}
        of_task["max_new_tokens"] = longest_answer(lm, train)
        base = fitting.origin().model_copy(update=of_task)
        entries = [
            TaskVector(
                (Edit(sites[best], Add(theta), strength=self.strength),), base.model_copy(update={"demos": one.demos})
            )
            for theta, one in zip(states[sites[best]], drawn, strict=True)
        ]
        return best, entries

    def _threshold(self, lm: LM, library: ElicitLibrary, given: Sequence[tuple[Train, Dev]]) -> float:
        """The score that `recall` of dev's queries reach with an entry of their own task."""
        reached = []
        for _, dev in given:
            own = [i for i, entry in enumerate(library.entries) if entry.origin and entry.origin.task == dev.spec.name]
            scores = library.scores(lm, [example.input for example in dev.examples[: self.n_dev]])
            reached.append(scores[:, own].amax(1).double())
        best = torch.cat(reached).sort(descending=True).values
        threshold = float(best[math.ceil(self.recall * len(best) - 1e-9) - 1])
        return threshold - 1e-4 * abs(threshold)  # the query that set it must pass, whatever its score rounds to
