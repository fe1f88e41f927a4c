"""The README's Python example runs as it stands, on the real model."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_example_is_short_and_compiles() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 11
    compile(example(), "README.md", "exec")


@pytest.mark.real
@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "few-shot-cached" in out
    assert "prompt tokens" in out
    assert " walked" in out
    assert (tmp_path / "past-tense" / "task_vector.safetensors").is_file()
