"""regress: what its commands do."""

import dataclasses
from pathlib import Path

from taskvec.cli import show
from taskvec.cli.work import ModelOptions
from taskvec.errors import MissingPackage
from taskvec.files import replaced
from taskvec.progress import shown


def train(config: str, out: Path, device: str, *, resume: bool, as_json: bool) -> None:
    """Train a learner; measure it beside classical estimators."""
    from taskvec.regress import load_config
    from taskvec.regress import train as train_learner
    from taskvec.regress.experiments import curve_rows
    from taskvec.regress.measure import Bench
    from taskvec.regress.plots import length_picture
    from taskvec.regress.tables import length_table

    settings = load_config(config)
    with shown():
        learner = train_learner(settings, out, resume=resume, device=device)
        rows = curve_rows(Bench(learner, settings.seed))
    try:
        with replaced(out / "error.svg") as new:
            new.write_text(length_picture(rows, yardsticks=True).svg, "utf-8")
    except MissingPackage as error:
        show.note(f"no error.svg: {error}")
    if as_json:
        show.emit({"learner": str(out), "curve": list(learner.curve), "rows": [row.to_dict() for row in rows]})
        return
    table = length_table(rows)
    show.say(table.caption)
    show.table([table.header, *table.rows])
    share = learner.curve[-1]["error"] / settings.family.variance
    show.say(f"Behind {settings.points - 1} examples {share:.1%} of the variance is left. Wrote {out}.")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is measured, in how many processes."""

    seeds: int
    functions: int
    jobs: int


def bench(names: list[str] | None, text: ModelOptions, out: Path, how: Sizes, *, as_json: bool) -> None:
    """Measure learners, and a language model on numbers as text."""
    from taskvec.regress.bench import regress_bench
    from taskvec.regress.learner import Learner, shipped
    from taskvec.regress.measure import Sizes as Counts
    from taskvec.regress.tables import all_tables, answer
    from taskvec.regress.text import TextSizes
    from taskvec.regress.write import write_results

    learners = [Learner.from_pretrained(name, device=text.device or "cpu") for name in names or shipped()]
    sizes = dataclasses.replace(Counts(), test=how.functions)
    with shown():
        asked = (text.load(), TextSizes()) if text.name else None
        rows = regress_bench(learners, out, seeds=range(how.seeds), sizes=sizes, text=asked, jobs=how.jobs)
    written = list[Path]()
    try:
        written = write_results(rows, out)
    except MissingPackage as error:
        show.note(f"no report.html: {error}")
    lead, details = answer(rows)
    if as_json:
        plain = [row.to_dict() for row in rows]
        show.emit({"answer": lead, "rows": plain, "run": str(out), "files": [str(path) for path in written]})
        return
    for table in all_tables(rows):
        show.say(f"\n{table.caption}")
        show.table([table.header, *table.rows])
    show.say("\n" + "\n".join([lead, *details]))
    for path in written:
        show.note(f"wrote {path}")
