"""godwit guest exec and copy: programs and files, in and out of a guest without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cli.output import Output, escape, output_options
from cli.session import Duration, Session, store_options
from replica.guest import Guest


def _guest_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--timeout",
            "timeout_seconds",
            type=Duration(),
            default="1m",
            show_default=True,
            help="How long it may take.",
        ),
        click.option("--machine", metavar="M", help="The recovery machine, where the VM has several."),
    ):
        function = option(function)
    return function


def _found(session: Session, name: str, machine: str | None) -> Guest:
    store = session.store()
    found = session.vm(store, name)
    return Guest.find(store, session.host, found, session.platform, machine=machine)


@click.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_guest_options
@store_options
@output_options
def execute(
    output: Output,
    name: str,
    command: tuple[str, ...],
    machine: str | None,
    timeout_seconds: int,
    *,
    session: Session,
) -> int:
    """Run COMMAND, a program and its arguments, in the guest of a recovery machine of the VM NAME.

    No shell is between: name one to have one. What the program writes comes out here, and the exit code is its own.
    Write -- before a program that is given --json.
    """
    program = command[1:] if command[0] == "--" else command  # what comes after NAME is not looked at by click
    if command[0] != "--" and command[0].startswith("-"):
        raise click.UsageError(f"{command[0]} comes after NAME, where the program is expected: write it before NAME")
    done = _found(session, name, machine).execute(program, timeout_seconds=timeout_seconds)

    def render() -> None:
        for stream, content in ((output.stdout, done.output), (output.stderr, done.error_output)):
            text = content.decode("utf-8", "replace")
            stream.write(escape(text, keep_newlines=True) if stream.isatty() else text)

    document = {
        "vm": name,
        "machine": done.machine,
        "status": done.status,
        "output": done.output.decode("utf-8", "replace"),
        "error_output": done.error_output.decode("utf-8", "replace"),
    }
    output.show(document, render)
    return done.status


@click.command()
@click.argument("name")
@click.argument("source")
@click.argument("target")
@_guest_options
@store_options
@output_options
def copy(
    output: Output, name: str, source: str, target: str, machine: str | None, timeout_seconds: int, *, session: Session
) -> None:
    """Copy the file SOURCE to TARGET, one of them in the guest of a recovery machine of the VM NAME: guest:/path."""
    guest = _found(session, name, machine)
    length = guest.copy(source, target, timeout_seconds=timeout_seconds)
    document = {"vm": name, "machine": guest.machine, "source": source, "target": target, "size_bytes": length}
    output.show(document, lambda: output.line(f"{guest.machine}: copied {source} to {target} ({length} bytes)"))
