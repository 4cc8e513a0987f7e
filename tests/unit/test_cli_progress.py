from __future__ import annotations

import io
import json
import time

import pytest

from cli.output import Output


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_each_phase_ends_in_a_json_line() -> None:
    stderr = io.StringIO()
    with Output(stderr=stderr).progress("convert") as report:
        for done in range(0, 101, 10):
            report(done, 100, "reading")
        report(5, 0, "writing")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [(line["phase"], line["done_bytes"], line["total_bytes"]) for line in lines] == [
        ("reading", 100, 100),
        ("writing", 5, None),
    ]


def test_lines_come_every_few_seconds_and_tell_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stderr = io.StringIO()
    with Output(stderr=stderr).progress("convert") as report:
        for second in range(11):
            report(second * 10, 200, "reading")
            clock[0] += 1
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [line["done_bytes"] for line in lines] == [20, 40, 60, 80, 100]
    assert lines[0]["bytes_per_second"] == 10
    assert lines[0]["seconds_left"] == 18


def test_quiet_says_nothing() -> None:
    stderr = Terminal()
    with Output(stderr=stderr, quiet=True).progress("convert") as report:
        report(1, 2, "reading")
    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_with_bytes_and_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stderr = Terminal()
    with Output(stderr=stderr).progress("convert") as report:
        report(0, 4 << 20, "reading")
        report(4 << 20, 4 << 20, "reading")
    assert "convert: reading" in stderr.getvalue()
    assert "4.2/4.2 MB" in stderr.getvalue() or "4.0/4.0 MiB" in stderr.getvalue()
