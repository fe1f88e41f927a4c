"""analyze: what the command does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taskvec.cli import show
from taskvec.cli.work import ModelOptions
from taskvec.errors import InputError, ModelError, unknown
from taskvec.progress import shown

if TYPE_CHECKING:
    from taskvec.analysis import Finding
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
    from taskvec.analysis import ANALYSES, Beside, Subject
    from taskvec.analysis.conflict import rival
    from taskvec.analysis.write import write_findings
    from taskvec.progress import track
    from taskvec.tasks import load_task

    for name in looked.what:
        if name not in (*ANALYSES, "all"):
            raise unknown("an analysis", name, (*ANALYSES, "all"))
    vector, *library = [_vector(registry.load(path), path) for path in (folder, *looked.beside)]
    origin = vector.origin
    assert origin is not None
    names = list(ANALYSES) if "all" in looked.what else list(dict.fromkeys(looked.what))
    shots, format = max(1, len(origin.demos)), origin.format.format()
    task = load_task(looked.data or origin.task, format=format, shots=shots, n_test=origin.n_test or 100)
    with shown():
        lm = ModelOptions(model.name or origin.model.id, model.device, model.dtype).load()
        other = load_task(looked.against or rival(task), format=format, shots=shots)
        subject = Subject.of(lm, vector, task, n=looked.n, seed=origin.seed, beside=Beside(other, tuple(library)))
        findings: list[Finding] = []
        left_out: dict[str, str] = {}
        for name in track(names, "analyses", len(names)):
            try:
                findings.append(ANALYSES[name](subject))
            except (InputError, ModelError) as error:
                if name in looked.what or len(names) == 1:
                    raise
                left_out[name] = str(error)
    written = write_findings(findings, f"{origin.method} on {task.name}", out)
    if as_json:
        rows = {one.name: one.frame.to_dicts() for one in findings}
        says = {one.name: one.picture.says for one in findings}
        files = [str(path) for path in written]
        show.emit({"says": says, "rows": rows, "left_out": left_out, "files": files})
        return
    for one in findings:
        show.say(f"{one.picture.title}: {one.picture.says}")
    for name, why in left_out.items():
        show.note(f"left out {name}: {why}")
    for path in written:
        show.note(f"wrote {path}")


def _vector(loaded: object, folder: Path) -> "TaskVector":
    from taskvec.vector import TaskVector

    if not isinstance(loaded, TaskVector) or loaded.origin is None:
        raise InputError("a task vector with its origin", str(folder), "compile one with another --method")
    return loaded
