"""Progress: silent unless shown, lines where there is no terminal, a bar where there is one, off by environment."""

import io
import sys
from types import SimpleNamespace

import pytest

from taskvec import progress
from taskvec.progress import note, shown, track

SWITCHES = ["TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)


def test_items_pass_through_silently_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_shown_prints_one_line_a_task_to_standard_error_only(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
        assert list(track([1, 2], "numbers", 2)) == [1, 2]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["letters ...", "numbers ..."]


def test_a_long_task_reports_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", -1.0)
    with shown():
        assert list(track("ab", "outer", 2)) == ["a", "b"]
    assert capsys.readouterr().err.splitlines() == ["outer ...", "outer 1/2, 0 s left", "outer 2/2"]


def test_a_line_is_printed_every_ten_seconds_and_not_more_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))
    now = [float(next(clock))]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with shown():
        for _ in track(range(8), "slow", 8):
            now[0] = float(next(clock))
    assert capsys.readouterr().err.splitlines() == ["slow ...", "slow 3/8, 20 s left", "slow 6/8, 8 s left"]


def test_a_note_changes_the_innermost_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", -1.0)
    note("nobody listens")
    with shown():
        for _ in track("a", "outer", 1):
            for _ in track("b", "inner", 1):
                note("loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["outer ...", "inner ...", "loss 0.5 0/1", "loss 0.5 1/1", "outer 1/1"]


def test_time_left_is_told_in_minutes_where_it_is_long() -> None:
    assert progress._left(["x", 10, 1, 60.0, 0.0]) == ", 9 min left"
    assert progress._left(["x", 10, 0, 60.0, 0.0]) == ""


def test_nested_tasks_are_counted_apart(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY_SECONDS", -1.0)
    with shown():
        for _ in track("ab", "outer", 2):
            list(track("x", "inner", 1))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("outer")] == ["outer ...", "outer 1/2, 0 s left", "outer 2/2"]
    assert [line for line in lines if line.startswith("inner")] == ["inner ...", "inner 1/1"] * 2


def test_silence_returns_after_shown_even_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with shown():
            list(track("a", "first", 1))
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    list(track("a", "second", 1))
    assert capsys.readouterr().err.splitlines() == ["first ..."]


def test_a_loop_that_is_left_early_breaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        for item in track(range(5), "left", 5):
            if item == 1:
                break
        assert list(track(range(2), "next", 2)) == [0, 1]
    assert capsys.readouterr().err.splitlines() == ["left ...", "next ..."]


def test_a_terminal_gets_a_bar_with_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with shown():
        assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
        assert progress._bars.get().tasks == []
    assert "letters" in screen.getvalue()
    assert "letters ..." not in screen.getvalue()


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "on"])
def test_the_environment_switches_it_off(
    name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with shown():
        assert list(track("abc", "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_a_switch_that_is_not_set_leaves_it_on(
    value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", value)
    with shown():
        list(track("a", "letters", 1))
    assert capsys.readouterr().err == "letters ...\n"
