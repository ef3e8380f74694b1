"""Progress where stderr is no terminal."""

import pytest

from vmoe.host.progress import progress, tracked


def test_slow_work_says_what_it_does_and_how_much_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = ""

    def until(line: str) -> None:
        nonlocal shown
        while line not in shown:
            shown += capsys.readouterr().err

    with progress("plots", ["loads", "patches"], seconds=1e-4) as advance:
        until("plots: loads, 0 of 2 done after 0 s\n")
        advance()
        until("plots: patches, 1 of 2 done after ")
    with progress("digits, batches", 2, seconds=1e-4) as advance:
        until("digits, batches: compiling, 0 of 2 done after ")
        advance()
        until("digits, batches, 1 of 2 done after ")


def test_slow_work_says_how_long_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(tracked([3, 4], "reading", 2)) == [3, 4]
    with progress("walking", None, first="", seconds=1e-4):
        shown = ""
        while "walking after 0 s\n" not in shown:
            shown += capsys.readouterr().err
    last = (shown + capsys.readouterr().err).splitlines()[-1]
    assert last.startswith("walking: done after ")


def test_quick_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("digits", 1, seconds=3600) as advance:
        advance()
    assert capsys.readouterr() == ("", "")
