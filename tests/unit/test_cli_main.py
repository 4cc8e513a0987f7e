from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from uuid import UUID

import click
import numpy as np
import pytest

from cli import failure, main
from cli.lazy import LazyCommand
from cli.output import Output, escape, output_options, to_json
from cli.sizes import human_size, parse_size
from replica.errors import ConfigurationError, LeaseHeldError, NoStoreError
from vhdx.errors import CorruptDiskError, DiskError

ROOT = Path(__file__).parents[2]


def run_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str, str]:
    @click.command()
    @output_options
    def fail(_: Output) -> None:
        """Fail."""
        raise error

    return run_command(fail, monkeypatch, *options)


def run_command(command: click.Command, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(LazyCommand, "load", lambda _: command)
    monkeypatch.setitem(main.COMMANDS, "run", LazyCommand("x:y", "Run."))
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = main.run(["run", *arguments], output)
    assert isinstance(output.stdout, io.StringIO)
    assert isinstance(output.stderr, io.StringIO)
    return code, output.stdout.getvalue(), output.stderr.getvalue()


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help_import_nothing_heavy(option: str) -> None:
    script = (
        "import sys; sys.argv = ['godwit', sys.argv[1]]\n"
        "from cli.main import main\n"
        "try: main()\n"
        "except SystemExit as leaving: code = leaving.code\n"
        "heavy = {'numpy', 'boto3', 'botocore', 'rich', 'zstandard', 'xxhash', 'vhdx.disk', 'logging', 'asyncio'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, option], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stderr.strip() == "0 []"
    assert "godwit" in done.stdout


@pytest.mark.parametrize(
    "error, code",
    [
        (DiskError("no"), 1),
        (CorruptDiskError("checksum differs", path="a.vhdx", offset=0x10000), 12),
        (NoStoreError("nothing there"), 10),
        (LeaseHeldError("held"), 11),
        (ConfigurationError("bad"), 13),
        (click.UsageError("wrong"), 2),
        (click.BadParameter("wrong"), 2),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (EOFError(), 130),
        (ZeroDivisionError("division by zero"), 1),
        (MemoryError(), 1),
    ],
)
def test_every_failure_has_its_exit_code_a_sentence_and_no_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(failure.DEBUG_VARIABLE, raising=False)
    seen, out, err = run_failing(error, monkeypatch)
    assert (seen, out) == (code, "")
    assert "godwit: " in err
    assert "Traceback" not in err


def test_a_failure_is_one_json_document_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    error = CorruptDiskError("checksum differs", path="a.vhdx", offset=0x10000, hint="Restore it.")
    code, out, err = run_failing(error, monkeypatch, "--json")
    assert code == 12
    assert json.loads(out)["error"] == {
        "type": "CorruptDiskError",
        "message": "a.vhdx: checksum differs (at offset 0x10000)",
        "hint": "Restore it.",
        "exit_code": 12,
        "path": "a.vhdx",
        "offset": 0x10000,
        "retryable": False,
    }
    assert "hint: Restore it." in err


def test_wrong_options_fail_as_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run_failing(DiskError("not reached"), monkeypatch, "--no-such-option", "--json")
    assert code == 2
    assert json.loads(out)["error"]["exit_code"] == 2


def test_a_failure_after_the_answer_adds_no_second_document(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    @output_options
    def answer_then_fail(output: Output) -> None:
        output.document({"done": True})
        raise DiskError("could not close")

    code, out, err = run_command(answer_then_fail, monkeypatch, "--json")
    assert (code, json.loads(out)) == (1, {"done": True})
    assert "could not close" in err


def test_an_unexpected_exception_points_to_the_debug_variable_which_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(failure.DEBUG_VARIABLE, raising=False)
    assert "GODWIT_DEBUG=1" in run_failing(ZeroDivisionError("x"), monkeypatch)[2]
    monkeypatch.setenv(failure.DEBUG_VARIABLE, "1")
    assert "Traceback" in run_failing(ZeroDivisionError("x"), monkeypatch)[2]


def test_control_characters_in_messages_never_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, err = run_failing(DiskError("bad \x1b]0;owned\x07 \u202e name", path="a\nb\udcff"), monkeypatch)
    assert "\x1b" not in err and "\u202e" not in err and "\x07" not in err
    assert "a\\x0ab\\udcff" in err


@pytest.mark.parametrize("returned, code", [(None, 0), (3, 3), (12, 12)])
def test_what_a_command_returns_is_the_exit_code(
    returned: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @output_options
    def command(_: Output) -> int | None:
        return returned

    assert run_command(command, monkeypatch)[0] == code


def test_a_reader_that_leaves_early_is_no_noise() -> None:
    script = "from cli.main import main; import sys; sys.argv = ['godwit', '--help']; sys.stdin.read(1); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == failure.FAILED


def test_a_question_without_a_terminal_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(click.UsageError, match="--yes"):
        Output().confirm("Really?", yes=False)
    Output().confirm("Really?", yes=True)


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("n\n", 1), ("\n", 1), ("", 130)])
def test_a_person_is_asked_on_stderr_and_may_decline(
    answer: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    @click.command()
    @output_options
    def command(output: Output) -> None:
        output.confirm("Really?", yes=False)

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    seen, out, err = run_command(command, monkeypatch)
    assert (seen, out) == (code, "")
    assert capsys.readouterr().out == ""
    assert ("nothing was changed" in err) == (code == 1)


@pytest.mark.parametrize(
    "value, expected",
    [
        (datetime(2026, 5, 1, 10, tzinfo=timezone(timedelta(hours=2))), "2026-05-01T08:00:00Z"),
        (Path("/a/b"), "/a/b"),
        (UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        (np.int64(7), 7),
        (np.array([[1, 2]]), [[1, 2]]),
        ((1, "a", None, True), [1, "a", None, True]),
        ({Path("k"): b"\x01\xff"}, {"k": "01ff"}),
    ],
)
def test_values_have_one_json_form(value: object, expected: object) -> None:
    assert to_json(value) == expected


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(TypeError, match="zone"):
        to_json(datetime(2026, 5, 1))


@pytest.mark.parametrize("head", [{}, {"path": "x", "inner": {"a": 1}}])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_streamed_document_is_valid_json(head: dict[str, object], count: int) -> None:
    output = Output(stdout=io.StringIO())
    output.document_with_items(head, "items", ({"n": n} for n in range(count)))
    assert isinstance(output.stdout, io.StringIO)
    assert json.loads(output.stdout.getvalue()) == {**head, "items": [{"n": n} for n in range(count)]}


def render(draw: Callable[[Output], None]) -> str:
    stdout = io.StringIO()
    draw(Output(stdout=stdout))
    return stdout.getvalue()


def test_a_table_off_a_terminal_is_aligned_plain_text() -> None:
    text = render(lambda output: output.table(["name", "size"], [["a", 5], ["long\x1b", 1000]], right=[1]))
    assert text == "NAME      SIZE\na            5\nlong\\x1b  1000\n"


def test_fields_leave_out_what_is_unknown() -> None:
    assert render(lambda output: output.fields([("a", 1), ("b", None), ("cc", ["x", "y"])])) == (
        "a:  1\ncc: x\n    y\n"
    )


def test_printable_text_of_any_language_is_left_alone() -> None:
    assert escape("größe 日本 é 😀") == "größe 日本 é 😀"


@pytest.mark.parametrize(
    "text, size",
    [("0", 0), ("512", 512), ("64M", 64 << 20), ("1.5T", 3 << 39), ("1 GiB", 1 << 30), ("2kb", 2048), ("7b", 7)],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1X", "1.5", "0.0001K", "1e3", "9999999P", "१", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (8 << 30, "8 GiB"), (2**63, "8192 PiB")],
)
def test_sizes_are_shown_with_their_unit(size: int, text: str) -> None:
    assert human_size(size) == text
