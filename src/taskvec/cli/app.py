"""The commands and their options. What they do is in `work` (vectors) and `lists` (what there is)."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m"

app = typer.Typer(
    name="taskvec",
    help="Compile few-shot prompts into in-context task vectors, and prove what they keep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[str, typer.Argument(help="A JSONL task file, or a built-in task's name (see `taskvec tasks`).")]
Model = Annotated[str, typer.Option("--model", help="An alias (see `taskvec models`), a folder, or a Hub id.")]
Format = Annotated[
    str | None,
    typer.Option("--format", help='qa, arrow, chat, or a template like "Review: {input}\\nSentiment: {output}\\n".'),
]
Instruction = Annotated[str, typer.Option("--instruction", help="Text that stands before the examples.")]
Shots = Annotated[int, typer.Option("--shots", help="Demonstrations in the few-shot prompt.")]
NTest = Annotated[int, typer.Option("--n-test", help="Test items (at most 40 % of the data).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="METHOD.FIELD=VALUE", help="Set a field of a method; repeatable.")
]
Device = Annotated[str | None, typer.Option("--device", help="Where the model runs, e.g. cuda.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 (default: the model's own).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Methods = Annotated[list[str] | None, typer.Option("--method", help="A method (see `taskvec methods`); repeatable.")]


@app.command()
def compile(
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="The vector folder to write.")],
    model: Model = DEFAULT_MODEL,
    format: Format = None,
    instruction: Instruction = "",
    shots: Shots = 10,
    n_test: NTest = 100,
    method: Methods = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the demonstrations and the method's noise.")] = 0,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing vector folder.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Fit task vectors for DATA, choose one on dev, report on test, and save it."""
    from taskvec.cli import work

    prompts = work.PromptOptions(format, instruction, shots, n_test)
    where = work.ModelOptions(model, device, dtype)
    work.compile_task(data, out, prompts, where, work.Choices(method, settings, (seed,), overwrite), as_json=json)


@app.command()
def eval(
    data: Data,
    model: Model = DEFAULT_MODEL,
    method: Methods = None,
    vector: Annotated[list[Path] | None, typer.Option("--vector", help="A vector folder; repeatable.")] = None,
    format: Format = None,
    instruction: Instruction = "",
    shots: Shots = 10,
    n_test: NTest = 100,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; default 0.")] = None,
    settings: Settings = None,
    examples: Annotated[Path | None, typer.Option("--examples", help="Write per-example rows to this parquet.")] = None,
    other_task: Annotated[
        str | None, typer.Option("--other-task", help="A vector source's control: vectors of this task's queries.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Score methods and saved vectors on DATA's test split, with the controls beside them."""
    from taskvec.cli import work

    prompts = work.PromptOptions(format, instruction, shots, n_test)
    where = work.ModelOptions(model, device, dtype)
    seeds, vectors = tuple(seed or [0]), tuple(vector or ())
    choices = work.Choices(method, settings, seeds, vectors=vectors, examples=examples, other=other_task)
    work.eval_task(data, prompts, where, choices, as_json=json)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A suite's YAML file, or a built-in one (see `taskvec tasks`).")],
    out: Annotated[Path, typer.Option("--out", help="The run's folder.")],
    model: Model = DEFAULT_MODEL,
    method: Methods = None,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds: 0, 1, ...")] = 3,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes, each with a model of its own.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Run methods and controls on every task of a suite, cell by cell, and write tables and a report."""
    from taskvec.cli import bench as run
    from taskvec.cli.work import ModelOptions

    options = run.RunOptions(method, settings, seeds, out, resume, jobs)
    run.bench(suite, ModelOptions(model, device, dtype), options, as_json=json)


@app.command()
def transfer(
    data: Data,
    source: Annotated[str, typer.Option("--from", help="The model whose few-shot effect is taken.")],
    target: Annotated[str, typer.Option("--to", help="The model that gets the vector.")] = DEFAULT_MODEL,
    way: Annotated[
        list[str] | None,
        typer.Option(
            "--way", help="direct, difference, conjugated, aligned, tokens, label-logits; repeatable; default: all."
        ),
    ] = None,
    format: Format = None,
    instruction: Instruction = "",
    shots: Shots = 10,
    n_test: NTest = 100,
    queries: Annotated[int, typer.Option("--queries", help="Unlabelled queries to fit on.")] = 256,
    ridge: Annotated[float, typer.Option("--ridge", help="The ridge's strength.")] = 5.0,
    seed: Annotated[list[int] | None, typer.Option("--seed", help="Repeatable; default 0.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Bring one model's few-shot effect into another, smaller one, and score it there."""
    from taskvec.cli import transfer as run
    from taskvec.cli.work import ModelOptions, PromptOptions

    prompts = PromptOptions(format, instruction, shots, n_test)
    models = ModelOptions(source, device, dtype), ModelOptions(target, device, dtype)
    options = run.TransferOptions(way, tuple(seed or [0]), {"ridge": ridge, "queries": queries})
    run.transfer_task(data, prompts, models, options, as_json=json)


regress = typer.Typer(no_args_is_help=True, help="Functions learned in context, and what vectors carry of them.")
app.add_typer(regress, name="regress")


@regress.command("train")
def regress_train(
    config: Annotated[str, typer.Argument(help="A learner's YAML file, or a built-in one, e.g. linear-d3.")],
    out: Annotated[Path, typer.Option("--out", help="The learner's folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Train a transformer to learn functions in context, and draw its error by the number of examples."""
    from taskvec.cli import regress as run

    run.train(config, out, device or "cpu", resume=resume, as_json=json)


@regress.command("bench")
def regress_bench(
    out: Annotated[Path, typer.Option("--out", help="The run's folder; what it holds is not measured again.")],
    learner: Annotated[
        list[str] | None, typer.Option("--learner", help="A folder, or a shipped learner; repeatable; default: those.")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help='The language model asked for functions of numbers as text ("": none).')
    ] = DEFAULT_MODEL,
    seeds: Annotated[int, typer.Option("--seeds", help="How many seeds: 0, 1, ...")] = 3,
    functions: Annotated[int, typer.Option("--functions", help="Functions in the test.")] = 48,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes of one thread each.")] = 2,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure what vectors carry of a function: length generalisation, shifts, task fidelity; tables and a report."""
    from taskvec.cli import regress as run
    from taskvec.cli.work import ModelOptions

    sizes = run.Sizes(seeds, functions, jobs)
    run.bench(learner, ModelOptions(text, device, None), out, sizes, as_json=json)


@app.command()
def analyze(
    vector: Annotated[Path, typer.Argument(help="The vector folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder for pictures, frames and the page.")],
    what: Annotated[list[str] | None, typer.Option("--what", help="An analysis, or all; repeatable.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model the vector was made for.")] = None,
    data: Annotated[str, typer.Option("--data", help="A task of the vector's format; default: its own.")] = "",
    against: Annotated[str, typer.Option("--against", help="Another task, for conflict and side effects.")] = "",
    beside: Annotated[list[Path] | None, typer.Option("--beside", help="Another vector's folder; repeatable.")] = None,
    n: Annotated[int, typer.Option("--n", help="Test items.")] = 40,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Look at what a saved vector does inside the model: pictures, and the numbers beside them."""
    from taskvec.cli import analyze as run
    from taskvec.cli.work import ModelOptions

    looked = run.Looked(what or ["all"], data, n, against, beside or [])
    run.analyze(vector, ModelOptions(model or "", device, dtype), looked, out, as_json=json)


@app.command()
def generate(
    vector: Annotated[Path, typer.Argument(help="The vector folder.")],
    text: Annotated[str | None, typer.Argument(help="One input; it is put into the vector's template.")] = None,
    input: Annotated[Path | None, typer.Option("--input", help='A JSONL with {"input": ...} lines.')] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The JSONL to write, with --input.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model the vector was made for.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send TEXT as it is, without the template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Default: the task's longest.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Let a saved vector answer: one text, or a file of inputs."""
    from taskvec.cli import work

    where = work.ModelOptions(model or "", device, dtype)
    asked = work.Asked(text, input, out, raw, max_new_tokens)
    work.generate_answers(vector, asked, where, as_json=json)


@app.command()
def inspect(vector: Annotated[Path, typer.Argument(help="The vector folder.")], json: Json = False) -> None:
    """Check a vector folder and say what is in it and where it is from."""
    from taskvec.cli import lists

    lists.show_vector(vector, as_json=json)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method's page: what it does, and its fields.")] = None,
    json: Json = False,
) -> None:
    """List the methods."""
    from taskvec.cli import lists

    if name is None:
        lists.show_methods(as_json=json)
    else:
        lists.show_method(name, as_json=json)


@app.command()
def models(json: Json = False) -> None:
    """List the models that have an alias."""
    from taskvec.cli import lists

    lists.show_models(as_json=json)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show this task's first examples.")] = None, json: Json = False
) -> None:
    """List the built-in tasks and suites."""
    from taskvec.cli import lists

    if name is None:
        lists.show_tasks(as_json=json)
    else:
        lists.show_task(name, as_json=json)


@app.command()
def doctor(model: Model = DEFAULT_MODEL, device: Device = None, dtype: Dtype = None, json: Json = False) -> None:
    """Check the installation, and prove a model's sites and its packed passes."""
    from taskvec.cli import lists

    lists.show_health(model, device, dtype, as_json=json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The vector folder to write (replaced if it is one).")] = Path(
        "demo-vector"
    ),
    json: Json = False,
) -> None:
    """The main job on real input: compile English past tense on SmolLM2-135M, and let the vector answer."""
    from taskvec.cli import work

    work.run_demo(out, DEFAULT_MODEL, as_json=json)
