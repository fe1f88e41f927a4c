"""bench: what the command does."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from taskvec.cli import show
from taskvec.cli.work import ModelOptions, parse_settings
from taskvec.errors import InputError, MissingPackage
from taskvec.progress import shown


@dataclass(frozen=True)
class RunOptions:
    """What is run, and where it is written."""

    methods: list[str] | None
    settings: list[str] | None
    seeds: int
    out: Path
    resume: bool
    jobs: int


def bench(source: str, where: ModelOptions, options: RunOptions, *, as_json: bool) -> None:
    """Run the grid, write tables and report."""
    from taskvec.bench import Grid, RunFolder, run_bench
    from taskvec.bench.grid import bench_methods
    from taskvec.report import read_run, write_report
    from taskvec.report.tables import accuracy
    from taskvec.report.write import write_tables
    from taskvec.tasks.suite import load_suite

    if options.jobs < 1:
        raise InputError("at least one job", f"--jobs {options.jobs}", "raise it")
    suite = load_suite(source)
    methods = bench_methods(options.methods, parse_settings(options.settings or []), suite.queries)
    with shown():
        lm = where.load()
        grid = Grid.of(lm, suite, methods, range(options.seeds))
        folder = RunFolder.open(options.out, grid, resume=options.resume)
        run_bench(lm, grid, folder, jobs=options.jobs, load=partial(ModelOptions.load, where))
    run = read_run(folder.path)
    try:
        written = write_report(run)
    except MissingPackage as error:
        written = write_tables(run)
        show.note(f"no report.html: {error}")
    if as_json:
        show.emit({**run.to_dict(), "run": str(folder.path), "files": [str(path) for path in written]})
        return
    table = accuracy(run)
    show.table([table.header, *table.rows])
    for verdict in run.verdicts():
        show.say(verdict.sentence)
    for failure in run.failures:
        show.note(f"failed: {failure.task} {failure.method} seed {failure.seed}: {failure.error}")
    for path in written:
        show.note(f"wrote {path}")
