"""analyze: what the command does."""

from dataclasses import dataclass
from pathlib import Path

from taskvec.cli import show
from taskvec.cli.work import ModelOptions
from taskvec.errors import InputError, unknown
from taskvec.progress import shown


@dataclass(frozen=True)
class Looked:
    """What is looked at: analyses by name, a task (empty: the vector's own), how many test items."""

    what: list[str]
    data: str
    n: int


def analyze(folder: Path, model: ModelOptions, looked: Looked, out: Path, *, as_json: bool) -> None:
    """Run the analyses on a saved vector."""
    from taskvec import methods as registry
    from taskvec.analysis import ANALYSES, Subject
    from taskvec.analysis.write import write_findings
    from taskvec.progress import track
    from taskvec.tasks import load_task
    from taskvec.vector import TaskVector

    for name in looked.what:
        if name not in (*ANALYSES, "all"):
            raise unknown("an analysis", name, (*ANALYSES, "all"))
    vector = registry.load(folder)
    if not isinstance(vector, TaskVector) or vector.origin is None:
        raise InputError("a task vector with its origin", str(folder), "compile one with another --method")
    origin = vector.origin
    names = list(ANALYSES) if "all" in looked.what else list(dict.fromkeys(looked.what))
    shots, format = max(1, len(origin.demos)), origin.format.format()
    task = load_task(looked.data or origin.task, format=format, shots=shots, n_test=origin.n_test or 100)
    with shown():
        lm = ModelOptions(model.name or origin.model.id, model.device, model.dtype).load()
        subject = Subject.of(lm, vector, task, n=looked.n, seed=origin.seed)
        findings = [ANALYSES[name](subject) for name in track(names, "analyses", len(names))]
    written = write_findings(findings, f"{origin.method} on {task.name}", out)
    if as_json:
        rows = {one.name: one.frame.to_dicts() for one in findings}
        says = {one.name: one.picture.says for one in findings}
        show.emit({"says": says, "rows": rows, "files": [str(path) for path in written]})
        return
    for one in findings:
        show.say(f"{one.picture.title}: {one.picture.says}")
    for path in written:
        show.note(f"wrote {path}")
