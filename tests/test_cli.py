"""The command line, in-process on a tiny model: what it prints, what it writes, and every kind of bad input."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from taskvec.cli import main
from taskvec.methods import METHODS
from taskvec.sites import Site
from taskvec.vector import OPS, TaskVector
from tests.tiny import build, tokenizer

Run = Callable[..., tuple[int, str, str]]
METRICS = ("accuracy", "first_token_accuracy", "d_ntp_full", "agreement")
FAST = (
    "--set",
    "learned.steps=2",
    "--set",
    "learned.layer=1",
    "--set",
    "learned.queries=8",
    "--set",
    "learned.batch=4",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny llama on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fifty rows: a word and its last letters."""
    path = tmp_path_factory.mktemp("data") / "tails.jsonl"
    rows = [{"input": f"w{i}ab", "output": "ab" if i % 2 else "ba"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `taskvec ARGUMENTS`: (exit code, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return int(stopped.value.code or 0), out.out, out.err

    return call


@pytest.fixture(scope="module")
def vector(model: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled vector folder."""
    out = tmp_path_factory.mktemp("vectors") / "tails"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["compile", data, "--model", model, "--out", str(out), "--shots", "3", "--format", "arrow"]
        patch.setattr(sys, "argv", ["taskvec", *arguments, "--method", "learned", *FAST])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return out


def one_line(err: str) -> str:
    """The only line of an error; it says what was wanted, found, and what to do."""
    lines = [line for line in err.splitlines() if line.startswith("taskvec:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert "wanted" in lines[0]
    assert "found" in lines[0]
    assert lines[0].count(";") >= 2
    return lines[0]


# --- what works ------------------------------------------------------------------------------------------------------


def test_compile_json_has_the_controls_the_metrics_and_a_folder_that_loads(
    run: Run, model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "vector"
    arguments = ("--model", model, "--out", str(out), "--shots", "3", "--method", "learned", "--method", "linear")
    code, stdout, _ = run("compile", data, *arguments, *FAST, "--json")
    assert code == 0
    result = json.loads(stdout)
    rows = {row["method"]: row for row in result["rows"]}
    controls = ["zero-shot", "few-shot", "few-shot-cached", "mean-difference", "random"]
    assert list(rows) == [*controls, "learned", "linear", "linear-shuffled"]
    assert result["chosen"] in ("learned", "linear")
    assert rows["random"]["matched"] == result["chosen"]
    for row in rows.values():
        assert {"source", "task", "seed", "n", "query_ms", "fit_tokens", "prompt_tokens"} <= row.keys()
        assert all(set(row[name]) == {"value", "low", "high"} for name in METRICS)
        assert row["d_ntp"] is None  # every output of this task starts with the same token, a blank
    assert rows["few-shot"]["prompt_tokens"] > rows["few-shot-cached"]["computed_tokens"]
    loaded = TaskVector.from_pretrained(out)
    assert loaded.origin is not None
    assert loaded.origin.method == result["chosen"]
    assert "## Scores" in (out / "README.md").read_text()


def test_compile_table_ends_with_the_verdict(run: Run, model: str, data: str, tmp_path: Path) -> None:
    arguments = ("--model", model, "--out", str(tmp_path / "v"), "--shots", "3", "--method", "linear")
    code, stdout, stderr = run("compile", data, *arguments)
    assert code == 0
    assert "few-shot-cached" in stdout
    assert "Saved linear in" in stdout
    assert "fitting" in stderr


def test_eval_scores_methods_and_vectors_for_every_seed_and_keeps_the_examples(
    run: Run, model: str, data: str, vector: Path, tmp_path: Path
) -> None:
    parquet = tmp_path / "rows.parquet"
    shared = ("--model", model, "--shots", "3", "--format", "arrow", "--seed", "0", "--seed", "5")
    code, stdout, _ = run("eval", data, *shared, "--vector", str(vector), "--examples", str(parquet), "--json")
    assert code == 0
    rows = json.loads(stdout)["rows"]
    assert [row["seed"] for row in rows if row["method"] == "few-shot"] == [0, 5]
    assert [row["source"] for row in rows if row["method"] == "learned"] == [str(vector)] * 2
    frame = pl.read_parquet(parquet)
    assert len(frame) == sum(row["n"] for row in rows)
    first = frame.filter((pl.col("method") == "few-shot") & (pl.col("seed") == 5))
    accuracy = next(row["accuracy"]["value"] for row in rows if row["method"] == "few-shot" and row["seed"] == 5)
    assert first["correct"].mean() == pytest.approx(accuracy)


def test_generate_answers_one_text_and_a_file_alike(run: Run, model: str, vector: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "w3ab"}\n\n{"input": 12.5}\n')
    code, single, _ = run("generate", str(vector), "w3ab", "--model", model)
    assert code == 0
    code, stdout, _ = run(
        "generate", str(vector), "--model", model, "--input", str(source), "--out", str(target), "--json"
    )
    assert code == 0
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert written == json.loads(stdout)["rows"]
    assert [row["input"] for row in written] == ["w3ab", "12.5"]
    assert written[0]["output"] == single.strip()


def test_raw_generation_warns_that_nothing_checks_the_template(run: Run, model: str, vector: Path) -> None:
    code, _, err = run("generate", str(vector), "w3ab ->", "--model", model, "--raw")
    assert code == 0
    assert "template" in err


def test_inspect_shows_edits_origin_and_scores(run: Run, vector: Path) -> None:
    code, stdout, _ = run("inspect", str(vector))
    assert code == 0
    assert "resid[1]" in stdout
    assert "learned" in stdout
    assert "few-shot-cached" in stdout
    code, stdout, _ = run("inspect", str(vector), "--json")
    config = json.loads(stdout)
    assert config["edits"][0]["site"] == "resid[1]"
    assert set(config["norms"]) == set(config["tensors"])


@pytest.mark.parametrize(
    ("command", "key"), [("methods", "methods"), ("models", "models"), ("tasks", "tasks"), ("doctor", "versions")]
)
def test_lists_print_tables_and_json(run: Run, model: str, command: str, key: str) -> None:
    extra = ("--model", model) if command == "doctor" else ()
    code, stdout, _ = run(command, *extra)
    assert code == 0
    assert len(stdout.splitlines()) > 2
    code, stdout, _ = run(command, *extra, "--json")
    assert code == 0
    assert json.loads(stdout)[key]


def test_methods_say_what_they_are_and_what_they_need(run: Run) -> None:
    code, stdout, _ = run("methods", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(stdout)["methods"]}
    assert set(rows) == {*METHODS, "random"}
    for row in rows.values():
        assert set(row) == {"name", "paper", "sites", "ops", "needs_labels", "needs_gradients"}
        assert all(Site.parse(f"{s}[0]" if s != "lm_head_in" else s) for s in row["sites"])
        assert set(row["ops"]) <= set(OPS)
    assert [name for name, row in rows.items() if row["needs_labels"]] == ["linear-probe", "calibration"]
    trained = {name for name, row in rows.items() if row["needs_gradients"]}
    assert trained == {"adaptive", "learned", "learnable", "i2cl", "lora", "prefix-tuning", "prompt-tuning"}


@pytest.mark.parametrize("name", ["linear-probe", "calibration"])
def test_a_method_for_labels_refuses_free_text(run: Run, model: str, data: str, name: str) -> None:
    code, _, err = run("eval", data, "--model", model, "--shots", "3", "--format", "arrow", "--method", name)
    assert code == 2
    assert f"a task with labels, for {name}" in err


def test_a_library_is_compiled_inspected_and_used(run: Run, model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "library"
    shared = ("--model", model, "--shots", "3", "--format", "arrow")
    small = ("--set", "elicit.others=", "--set", "elicit.prompts=2", "--set", "elicit.retriever=dense")
    code, stdout, _ = run("compile", data, *shared, "--method", "elicit", *small, "--out", str(out), "--json")
    assert code == 0
    rows = {row["method"] for row in json.loads(stdout)["rows"]}
    assert {"elicit", "elicit-shuffled", "random", "few-shot-cached"} <= rows
    code, stdout, _ = run("inspect", str(out))
    assert code == 0
    assert "elicit" in stdout
    code, stdout, _ = run("generate", str(out), "w3ab", "--model", model)
    assert code == 0
    code, stdout, _ = run("eval", data, *shared, "--vector", str(out), "--json")
    assert code == 0
    assert [row["method"] for row in json.loads(stdout)["rows"] if row["source"]] == ["elicit"]


def test_a_rival_that_makes_no_vector_is_not_compiled(run: Run, model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "v"
    code, _, err = run("compile", data, "--model", model, "--shots", "3", "--method", "lora", "--out", str(out))
    assert (code, out.exists()) == (2, False)
    assert "a method that makes a vector; found lora" in err


def test_pages_of_one_method_and_one_task(run: Run) -> None:
    code, stdout, _ = run("methods", "linear")
    assert code == 0
    assert "2605.20730" in stdout
    assert "ridge" in stdout
    code, stdout, _ = run("methods", "learned", "--json")
    assert "lr_rms" in json.loads(stdout)["fields"]
    code, stdout, _ = run("tasks", "past-tense")
    assert code == 0
    assert "walk" in stdout or "->" in stdout or "past_tense" in stdout
    code, stdout, _ = run("tasks", "plural", "--json")
    assert len(json.loads(stdout)["examples"]) == 10


def test_escapes_in_a_format_are_decoded_and_other_characters_kept(
    run: Run, model: str, data: str, tmp_path: Path
) -> None:
    out = tmp_path / "v"
    template = r"Wörd: {input}\nTail: {output}\n"
    arguments = ("--model", model, "--out", str(out), "--shots", "3", "--format", template, "--method", "linear")
    code, _, _ = run("compile", data, *arguments, "--instruction", "Say the tail.")
    assert code == 0
    origin = TaskVector.from_pretrained(out).origin
    assert origin is not None
    assert origin.format.template == "Wörd: {input}\nTail: {output}\n"
    assert origin.format.instruction == "Say the tail."


def test_set_reaches_the_method_and_the_origin(vector: Path) -> None:
    origin = TaskVector.from_pretrained(vector).origin
    assert origin is not None
    assert origin.hyperparameters["layer"] == 1
    assert origin.hyperparameters["steps"] == 2


# --- bad input -------------------------------------------------------------------------------------------------------


def bad_files() -> dict[str, tuple[str, str]]:
    good = "".join(json.dumps({"input": f"w{i}", "output": "x"}) + "\n" for i in range(50))
    return {
        "empty": ("", "empty"),
        "not JSON": (good + "nope\n", "line 51"),
        "missing key": (good + '{"input": "a"}\n', "line 51"),
        "not finite": (good + '{"input": "a", "output": NaN}\n', "line 51"),
        "a list": (good + '{"input": "a", "output": [1]}\n', "line 51"),
        "too few": ('{"input": "a", "output": "b"}\n', "examples"),
    }


@pytest.mark.parametrize("kind", bad_files())
def test_bad_data_is_one_line_and_exit_2_and_nothing_written(run: Run, model: str, tmp_path: Path, kind: str) -> None:
    content, wanted = bad_files()[kind]
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    path.write_text(content)
    code, stdout, err = run("compile", str(path), "--model", model, "--out", str(out))
    assert code == 2
    assert stdout == ""
    assert wanted in one_line(err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


BAD_OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "no input in the template": (("--format", "x: {output}\\n"), "{input}"),
    "no output in the template": (("--format", "x: {input}\\n"), "{output}"),
    "unknown format": (("--format", "qaa"), "qaa"),
    "unknown method": (("--method", "magic"), "magic"),
    "unknown field": (("--method", "learned", "--set", "learned.size=3"), "size"),
    "bad value": (("--method", "learned", "--set", "learned.layer=top"), "top"),
    "set without a method": (("--method", "linear", "--set", "learned.layer=1"), "learned"),
    "malformed set": (("--set", "learned"), "METHOD.FIELD=VALUE"),
    "unknown layer": (("--method", "learned", "--set", "learned.layer=99"), "layer"),
    "unknown site": (("--method", "linear", "--set", "linear.site=nowhere"), "nowhere"),
    "only prompts": (("--method", "zero-shot"), "vector"),
    "no shots": (("--shots", "0"), "shot"),
    "too many shots": (("--shots", "400"), "400"),
    "prompt too long": (("--instruction", "word " * 600), "512"),
    "no test items": (("--n-test", "0"), "n_test"),
    "negative seed": (("--seed", "-1"), "seed"),
    "no chat template": (("--format", "chat"), "chat"),
    "unknown dtype": (("--dtype", "float7"), "float7"),
    "unknown device": (("--device", "cuda:7"), "cuda:7"),
    "bad escape": (("--format", "{input}\\x -> {output}"), "escape"),
}


@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_bad_options_are_one_line_and_exit_2_and_nothing_written(
    run: Run, model: str, data: str, tmp_path: Path, kind: str
) -> None:
    options, wanted = BAD_OPTIONS[kind]
    defaults = () if "--shots" in options else ("--shots", "3")
    code, stdout, err = run("compile", data, "--model", model, "--out", str(tmp_path / "out"), *defaults, *options)
    assert code == 2
    assert stdout == ""
    assert wanted in one_line(err)
    assert list(tmp_path.iterdir()) == []


def test_unknown_model_and_unknown_data_are_refused(run: Run, data: str, tmp_path: Path) -> None:
    code, _, err = run("compile", data, "--model", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "nothing" in one_line(err)
    code, _, err = run("eval", "no-such-task")
    assert code == 2
    assert "past_tense" in one_line(err)


def test_an_existing_folder_is_refused_unless_overwritten(run: Run, model: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shared = ("--model", model, "--out", str(out), "--shots", "3", "--method", "linear")
    assert run("compile", data, *shared)[0] == 0
    code, _, err = run("compile", data, *shared)
    assert code == 2
    assert "--overwrite" in one_line(err)
    assert run("compile", data, *shared, "--overwrite", "--seed", "3")[0] == 0
    origin = TaskVector.from_pretrained(out).origin
    assert origin is not None
    assert origin.seed == 3


def test_a_vector_of_another_model_template_or_test_split_is_refused(
    run: Run, model: str, data: str, vector: Path, tmp_path: Path
) -> None:
    other = tmp_path / "gpt2"
    build("gpt2").save_pretrained(other)
    tokenizer().save_pretrained(other)
    shared = ("--shots", "3", "--vector", str(vector))
    assert "fingerprint" in one_line(run("eval", data, "--model", str(other), "--format", "arrow", *shared)[2])
    assert "fingerprint" in one_line(run("generate", str(vector), "w1ab", "--model", str(other))[2])
    code, _, err = run("eval", data, "--model", model, "--format", "qa", *shared)
    assert code == 2
    assert "template" in one_line(err)


def test_a_changed_byte_is_refused(run: Run, model: str, vector: Path, tmp_path: Path) -> None:
    for name in ("task_vector.safetensors", "task_vector_config.json", "README.md"):
        copy = tmp_path / name.replace(".", "-")
        copy.mkdir()
        for file in vector.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(bytes(content))
        code, _, err = run("generate", str(copy), "w1ab", "--model", model)
        assert code == 2
        one_line(err)


@pytest.mark.parametrize(
    "arguments",
    [(), ("a", "--input", "x.jsonl", "--out", "y.jsonl"), ("--input", "x.jsonl"), ("--out", "y.jsonl", "a"), (" ",)],
)
def test_generate_wants_one_text_or_two_files(run: Run, vector: Path, arguments: tuple[str, ...]) -> None:
    code, _, err = run("generate", str(vector), *arguments)
    assert code == 2
    one_line(err)


@pytest.mark.parametrize("content", ["", "[]\n", '{"text": "a"}\n', '{"input": true}\n', '{"input": " "}\n', "{\n"])
def test_bad_input_files_write_no_output(run: Run, vector: Path, tmp_path: Path, content: str) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    code, _, err = run("generate", str(vector), "--input", str(source), "--out", str(target))
    assert code == 2
    one_line(err)
    assert not target.exists()


def test_usage_errors_exit_with_2(run: Run) -> None:
    assert run("compile")[0] == 2
    assert run("nonsense")[0] == 2


def test_an_interrupt_leaves_no_half_written_folder(
    monkeypatch: pytest.MonkeyPatch, model: str, data: str, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("taskvec.vector.store._move", interrupted)
    arguments = [
        "compile",
        data,
        "--model",
        model,
        "--out",
        str(tmp_path / "out"),
        "--shots",
        "3",
        "--method",
        "linear",
    ]
    monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main()
    assert list(tmp_path.iterdir()) == []


# --- what only a new process can show --------------------------------------------------------------------------------


def test_importing_taskvec_loads_neither_torch_nor_any_extra() -> None:
    heavy = "torch transformers datasets accelerate sklearn scipy bm25s gguf matplotlib plotly peft polars numpy"
    code = f"import sys, taskvec; dir(taskvec); print(sorted(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch_and_names_every_command() -> None:
    code = (
        "import sys\nfrom taskvec.cli import main\nsys.argv = ['taskvec', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for command in ("compile", "eval", "generate", "inspect", "methods", "models", "tasks", "doctor", "demo"):
        assert command in done.stdout


def test_public_names_are_few_sorted_and_real() -> None:
    import taskvec

    assert len(taskvec.__all__) <= 25
    assert taskvec.__all__ == sorted(taskvec.__all__)
    assert all(getattr(taskvec, name) is not None for name in taskvec.__all__)
    assert callable(taskvec.compare)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = taskvec.nonsense
