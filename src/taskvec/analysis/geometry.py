"""Geometry of a library of vectors: are vectors of one task alike, whatever the seed, the layer, the method?

- cosine of pairs, by what they share (task, layer, method; pairs that share all differ in their seed); beside random
  directions;
- separability: how often a vector's nearest neighbour is of its task; clustering: how well as many clusters as tasks
  (average linkage of cosine distances) are the tasks, by the adjusted Rand index. The null: tasks permuted;
- alignment: the share of a vector in the span of its own task's outputs, beside that of random tokens, as many;
- effective rank: exp of the entropy of the squared singular values of the unit vectors, beside random ones;
- arithmetic: with b, c two vectors of one other task, a - b + c should do a's task as a does; composition: a + b on
  both tasks. The null has random directions of the norms of c - b, and of b (of a, on b's task), in their places. All
  are vectors of a's layer, where they are added.

Shapes: m vectors, d width of the residual stream, n prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from taskvec.analysis.finding import Cells, Finding, Found, average, jackknifed, places, share, value
from taskvec.analysis.lens import alignment, spans
from taskvec.analysis.subject import Subject, likeliest, one_addition
from taskvec.errors import InputError
from taskvec.evaluate.observe import check_unseen, encode_answers, first_tokens
from taskvec.replay import Ask, Trial, replay
from taskvec.results import Metric
from taskvec.tasks import Task, load_task

LEAST = 3
"""Other vectors."""
SHUFFLES = 200
PAIRS = 3
"""Pairs of other vectors that arithmetic is tried with."""


@dataclass(frozen=True, eq=False)
class Shelf:
    """The vectors' rows, and what each is of. The subject's own comes first."""

    rows: Float[Tensor, "m d"]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    layers: tuple[int | None, ...]

    @classmethod
    def of(cls, subject: Subject) -> "Shelf":
        """Raises `InputError` for fewer than `LEAST` others, one task only, and other vectors than one addition."""
        if len(subject.beside.vectors) < LEAST:
            fix = "name folders of other seeds and tasks with --beside"
            raise InputError(f"at least {LEAST} other vectors", str(len(subject.beside.vectors)), fix)
        vectors = (subject.vector, *subject.beside.vectors)
        sites, rows = zip(*map(one_addition, vectors), strict=True)
        origins = [vector.origin for vector in vectors]
        tasks = tuple(origin.task if origin is not None else "" for origin in origins)
        methods = tuple(origin.method if origin is not None else "" for origin in origins)
        if len(set(tasks)) < 2:
            raise InputError("vectors of at least two tasks", tasks[0], "name another task's with --beside")
        return cls(torch.stack(rows), tasks, methods, tuple(site.layer for site in sites))


def geometry(subject: Subject) -> Finding:
    """Similarity, clustering, alignment, rank, arithmetic."""
    shelf = Shelf.of(subject)
    tasks = {name: _task(subject, name) for name in dict.fromkeys(shelf.tasks)}
    found: Found = [*_similar(shelf), *_grouped(shelf), *_aligned(subject, shelf, tasks)]
    found += [*_ranks(shelf), *_arithmetic(subject, shelf, tasks)]
    drawn = (
        places("cosine of pairs", found, x="of", by="kind", where={"measure": "cosine"}, nulls=["null"]),
        places("are groups the tasks?", found, x="of", by="kind", where={"measure": "groups"}, nulls=["null"]),
        places("in the span of outputs", found, x="of", by="kind", where={"measure": "alignment"}, nulls=["null"]),
        places("accuracy of sums", found, x="of", by="kind", where={"measure": "accuracy"}, nulls=["null"]),
    )
    return Finding("geometry", "Geometry of a library", _says(shelf, found), drawn, found)


def _task(subject: Subject, name: str) -> Task:
    """The task, with no test item that one of its vectors was fitted on."""
    spec = subject.task.spec
    if name == spec.name:
        return subject.task
    origins = [vector.origin for vector in subject.beside.vectors if vector.origin is not None]
    kept = [origin.n_test for origin in origins if origin.task == name and origin.n_test]
    task = load_task(name, format=spec.format, shots=spec.shots, n_test=min(kept, default=100))
    for origin in origins:
        check_unseen(task.test, origin)
    return task


# --- alike -----------------------------------------------------------------------------------------------------------


def cosines(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m m"]:
    """Of all pairs."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    table: Tensor = unit @ unit.T
    return table


def _similar(shelf: Shelf) -> Iterator[tuple[Cells, Metric]]:
    every = list(combinations(range(len(shelf.rows)), 2))
    table, kinds = cosines(shelf.rows), dict[str, list[tuple[int, int]]]()
    for i, j in every:
        named = (("task", shelf.tasks), ("layer", shelf.layers), ("method", shelf.methods))
        same = ", ".join(name for name, of in named if of[i] == of[j])
        kinds.setdefault(f"same {same}" if same else "nothing the same", []).append((i, j))
    for name, pairs in sorted(kinds.items()):
        yield {"measure": "cosine", "of": name, "kind": "vectors"}, paired(table, pairs)
    yield {"measure": "cosine", "of": "random directions", "kind": "null"}, paired(cosines(_random(shelf.rows)), every)


def paired(table: Float[Tensor, "m m"], pairs: Sequence[tuple[int, int]]) -> Metric:
    """The mean over pairs; its interval by vector, each left out once, for pairs that share one are not independent. No
    interval where a vector is in all of them."""
    less = [
        [float(table[pair]) for pair in pairs if left not in pair]
        for left in sorted({i for pair in pairs for i in pair})
    ]
    whole = float(np.mean([float(table[pair]) for pair in pairs]))
    return jackknifed(whole, [float(np.mean(some)) for some in less] if all(less) else [])


def _random(rows: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    scaled: Tensor = drawn * (rows.norm(dim=1) / drawn.norm(dim=1))[:, None]
    return scaled


def _grouped(shelf: Shelf) -> Iterator[tuple[Cells, Metric]]:
    from sklearn.metrics import adjusted_rand_score

    table = cosines(shelf.rows).double().numpy()
    tasks = np.unique(np.array(shelf.tasks), return_inverse=True)[1]
    clusters = clustered(table, len(set(shelf.tasks)))
    measures: dict[str, Callable[[NDArray[np.int64]], float]] = {
        "nearest is of its task": lambda names: nearest(table, names),
        "clusters (adjusted Rand)": lambda names: float(adjusted_rand_score(clusters, names)),
    }
    rng = np.random.default_rng(0)
    for name, measure in measures.items():
        own = measure(tasks)
        yield {"measure": "groups", "of": name, "kind": "vectors"}, Metric(own, own, own)
        drawn = np.array([measure(rng.permutation(tasks)) for _ in range(SHUFFLES)])
        low, high = np.quantile(drawn, [0.025, 0.975])
        yield {"measure": "groups", "of": name, "kind": "null"}, Metric(float(drawn.mean()), float(low), float(high))


def nearest(table: NDArray[np.float64], names: NDArray[np.int64]) -> float:
    """The share of vectors whose nearest other has their name."""
    others = table - 3 * np.eye(len(table))
    return float((names[others.argmax(1)] == names).mean())


def clustered(table: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """As many clusters, by average linkage of cosine distances."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    apart = np.clip(1 - table, 0, None)
    np.fill_diagonal(apart, 0)
    found = fcluster(linkage(squareform(apart, checks=False), "average"), count, "maxclust")
    return np.asarray(found, dtype=np.int64)


def _aligned(subject: Subject, shelf: Shelf, tasks: dict[str, Task]) -> Iterator[tuple[Cells, Metric]]:
    for name, task in tasks.items():
        own, random = spans(subject, _outputs(subject, task))
        rows = shelf.rows[[i for i, task in enumerate(shelf.tasks) if task == name]]
        yield {"measure": "alignment", "of": name, "kind": "its task's"}, average(alignment(own, rows))
        null = torch.cat([alignment(one, rows) for one in random])
        yield {"measure": "alignment", "of": name, "kind": "null"}, average(null)


def _outputs(subject: Subject, task: Task) -> list[int]:
    return sorted({int(tokens[0]) for tokens in first_tokens(subject.lm, task.test)})


def _ranks(shelf: Shelf) -> Iterator[tuple[Cells, Metric]]:
    for kind, rows in (("vectors", shelf.rows), ("null", _random(shelf.rows))):
        rank = effective_rank(rows)
        yield {"measure": "effective rank", "of": f"{len(rows)} vectors", "kind": kind}, Metric(rank, rank, rank)


def effective_rank(rows: Float[Tensor, "m d"]) -> float:
    """exp of the entropy of the squared singular values of the unit rows, as shares."""
    shares = torch.linalg.svdvals((rows / rows.norm(dim=1, keepdim=True)).double()).square()
    shares = shares / shares.sum()
    return float(torch.special.entr(shares).sum().exp())


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _arithmetic(subject: Subject, shelf: Shelf, tasks: dict[str, Task]) -> Iterator[tuple[Cells, Metric]]:
    own, name = shelf.rows[0], shelf.tasks[0]
    there = [i for i, layer in enumerate(shelf.layers) if layer == shelf.layers[0] and shelf.tasks[i] != name]
    yield _tried(subject, f"a on {name}", "vectors", tasks[name], [own])
    pairs = [(i, j) for i, j in combinations(there, 2) if shelf.tasks[i] == shelf.tasks[j]][:PAIRS]
    if pairs:
        moves = torch.stack([shelf.rows[j] - shelf.rows[i] for i, j in pairs])
        for kind, rows in (("vectors", moves), ("null", _random(moves))):
            yield _tried(subject, f"a - b + c on {name}", kind, tasks[name], list(own + rows))
    for theirs, i in {shelf.tasks[i]: i for i in reversed(there)}.items():
        b = shelf.rows[i]
        noise_a, noise_b = _random(torch.stack([own, b]))
        yield _tried(subject, f"b on {theirs}", "vectors", tasks[theirs], [b])
        for kind, for_b, for_a in (("vectors", own, b), ("null", noise_a, noise_b)):
            yield _tried(subject, f"a + b on {theirs}", kind, tasks[theirs], [b + for_b])
            yield _tried(subject, f"a + b on {name} (b of {theirs})", kind, tasks[name], [own + for_a])


def _tried(subject: Subject, of: str, kind: str, task: Task, rows: Sequence[Tensor]) -> tuple[Cells, Metric]:
    hits = torch.cat([_hits(subject, task, row) for row in rows])
    return {"measure": "accuracy", "of": of, "kind": kind}, share(hits)


def _hits(subject: Subject, task: Task, row: Tensor) -> Tensor:
    """Which of a task's zero-shot items are right with the row at the vector's place."""
    vector = subject.added(row, subject.layer)
    if task is subject.task:
        return subject.hits([vector] * len(subject.bare))
    examples = task.test.examples[: len(subject.bare)]
    prompts = [subject.lm.encode(task.spec.format.prompt(example.input)) for example in examples]
    golds = [int(gold[0]) for gold in encode_answers(subject.lm, task.test)[0][: len(prompts)]]
    trials = [Trial(i, vector) for i in range(len(prompts))]
    found: Tensor = replay(subject.lm, prompts).answer(trials, Ask(keep=likeliest)).kept == torch.tensor(golds)
    return found


def _says(shelf: Shelf, found: Found) -> str:
    def of(name: str, kind: str = "vectors") -> float:
        return value(found, of=name, kind=kind).value

    kinds = {of_["of"]: m for of_, m in found if of_["measure"] == "cosine"}
    alike = ", ".join(f"{name} {metric.value:.2f}" for name, metric in kinds.items())
    near, chance = (of("nearest is of its task", kind) for kind in ("vectors", "null"))
    rank = {of_["kind"]: m.value for of_, m in found if of_["measure"] == "effective rank"}
    return (
        f"{len(shelf.rows)} vectors of {len(set(shelf.tasks))} tasks. Mean cosine: {alike}. The nearest vector is of "
        f"the same task in {near:.2f} of cases (by chance {chance:.2f}); effective rank {rank['vectors']:.1f} (random "
        f"{rank['null']:.1f})."
    )
