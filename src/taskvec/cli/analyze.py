"""analyze: what the command does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec.cli import show
from taskvec.cli.work import ModelOptions
from taskvec.errors import InputError, ModelError, unknown
from taskvec.progress import shown

if TYPE_CHECKING:
    from taskvec.analysis import Finding, Subject
    from taskvec.vector import TaskVector


@dataclass(frozen=True)
class Looked:
    """What is looked at: analyses by name, a task (empty: the vector's own), how many test items; another task
    (empty: the built-in one with most queries in common), folders of other vectors."""

    what: list[str]
    data: str
    n: int
    against: str
    beside: list[Path]


def analyze(folder: Path, model: ModelOptions, looked: Looked, out: Path, *, as_json: bool) -> None:
    """Run the analyses on a saved vector."""
    from taskvec import methods as registry
    from taskvec.analysis import ANALYSES
    from taskvec.analysis.write import write_findings

    for name in looked.what:
        if name not in (*ANALYSES, "all"):
            raise unknown("an analysis", name, (*ANALYSES, "all"))
    vectors = [_vector(registry.load(path), path) for path in (folder, *looked.beside)]
    with shown():
        subject = _subject(vectors, model, looked)
        findings, left_out = _found(subject, looked.what)
    origin = vectors[0].origin
    assert origin is not None
    written = write_findings(findings, f"{origin.method} on {subject.task.name}", out)
    if as_json:
        rows = {one.name: one.frame.to_dicts() for one in findings}
        says = {one.name: one.says for one in findings}
        files = [str(path) for path in written]
        show.emit({"says": says, "rows": rows, "left_out": left_out, "files": files})
        return
    for one in findings:
        show.say(f"{one.title}: {one.says}")
    for name, why in left_out.items():
        show.note(f"left out {name}: {why}")
    for path in written:
        show.note(f"wrote {path}")


def _subject(vectors: "list[TaskVector]", model: ModelOptions, looked: Looked) -> "Subject":
    """The first vector on its task, beside another task and the other vectors."""
    from taskvec.analysis import Beside, Subject
    from taskvec.analysis.conflict import rival
    from taskvec.tasks import load_task

    origin = vectors[0].origin
    assert origin is not None
    shots, format = max(1, len(origin.demos)), origin.format.format()
    task = load_task(looked.data or origin.task, format=format, shots=shots, n_test=origin.n_test or 100)
    lm = ModelOptions(model.name or origin.model.id, model.device, model.dtype).load()
    beside = Beside(load_task(looked.against or rival(task), format=format, shots=shots), tuple(vectors[1:]))
    return Subject.of(lm, vectors[0], task, n=looked.n, seed=origin.seed, beside=beside)


def _found(subject: "Subject", what: list[str]) -> "tuple[list[Finding], dict[str, str]]":
    """Findings; and, where all are asked for, those that have no meaning for this vector, with the reason."""
    from taskvec.analysis import ANALYSES
    from taskvec.progress import track

    findings: list[Finding] = []
    left_out: dict[str, str] = {}
    names = list(ANALYSES) if "all" in what else list(dict.fromkeys(what))
    for name in track(names, "analyses", len(names)):
        try:
            findings.append(ANALYSES[name](subject))
        except (InputError, ModelError) as error:
            if name in what:
                raise
            left_out[name] = str(error)
    return findings, left_out


def _vector(loaded: object, folder: Path) -> "TaskVector":
    from taskvec.vector import TaskVector

    if not isinstance(loaded, TaskVector) or loaded.origin is None:
        raise InputError("a task vector with its origin", str(folder), "compile one with another --method")
    return loaded
