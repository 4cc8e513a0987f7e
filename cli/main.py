"""The entry point: answers --version and --help without importing what only the commands need."""

from __future__ import annotations

import _thread
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cli import failure
from cli.lazy import LazyCommand, LazyGroup
from cli.output import Output

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

# Every command, in the order in which the help lists them.
COMMANDS: dict[str, LazyCommand] = {
    "init": LazyCommand("cli.stores:init", "Make an address a store."),
    "protect": LazyCommand("cli.protection:protect", "Protect a VM, made of its disk files."),
    "status": LazyCommand("cli.protection:status", "Show the protected VMs and how they stand."),
    "replicate": LazyCommand("cli.replication:replicate", "Make a recovery point of a VM as it is now."),
    "run": LazyCommand("cli.run:run", "Be the agent: replicate this host's VMs at their intervals."),
    "points": LazyCommand("cli.replication:points", "List the recovery points of a VM."),
    "checkpoints": LazyCommand("cli.checkpoints:checkpoints", "Show the chains of a VM's disks, and merge them."),
    "health": LazyCommand("cli.health:health", "Show how well the VMs are protected, and why not."),
    "top": LazyCommand("cli.top:top", "Watch the VMs, and what this machine's agent does."),
    "restore": LazyCommand("cli.recovery:restore", "Restore disks of a VM into new files."),
    "serve": LazyCommand("cli.serving:serve", "Serve the disks of a recovery point by NBD."),
    "failover": LazyCommand("cli.failover:failover", "Start a VM elsewhere, from a recovery point."),
    "commit": LazyCommand("cli.failover:commit", "Settle for the point that a VM was failed over to."),
    "cleanup": LazyCommand("cli.failover:cleanup", "Remove what a failover made."),
    "reprotect": LazyCommand("cli.failback:reprotect", "Replicate a VM from its recovery machine."),
    "failback": LazyCommand("cli.failback:failback", "Bring a VM home, with only what has changed."),
    "adopt": LazyCommand("cli.failback:adopt", "Join a VM that came back with a new id to its history."),
    "plan": LazyCommand("cli.plan:plan", "Run recovery plans: many VMs, in an order that is written down."),
    "drill": LazyCommand("cli.drill:drill", "Start a VM in a network of its own, check it, remove it."),
    "evidence": LazyCommand("cli.evidence:evidence", "Verify what drills left as evidence."),
    "verify": LazyCommand("cli.damage:verify", "Verify recovery points without changing anything."),
    "repair": LazyCommand("cli.damage:repair", "Make the newest recovery point of a VM whole again."),
    "prune": LazyCommand("cli.housekeeping:prune", "Remove the recovery points that the retention rule does not keep."),
    "gc": LazyCommand("cli.housekeeping:gc", "Delete what no recovery point needs any more."),
    "retain": LazyCommand("cli.housekeeping:retain", "Prolong the locks of what the kept points need."),
    "policy": LazyCommand("cli.policy:policy", "Print a bucket policy with the least that each role needs."),
    "pin": LazyCommand("cli.housekeeping:pin", "Keep a recovery point whatever the retention rule says."),
    "unpin": LazyCommand("cli.housekeeping:unpin", "Leave a recovery point to the retention rule again."),
    "key": LazyCommand("cli.key:key", "Make and care for a tenant's encryption key."),
    "guest": LazyCommand("cli.guest:guest", "Reach into the guest of a recovery machine without a network."),
    "convert": LazyCommand("cli.conversion:convert", "Convert an OS disk between Generation 2 and 1."),
    "inspect": LazyCommand("cli.conversion:inspect", "Look at an OS disk: its system, and whether it converts."),
    "disk": LazyCommand("cli.disk:disk", "Inspect, check, convert and change disk images."),
}


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version  # noqa: PLC0415 - costs more than the rest of the start

        context.ensure_object(Output).stdout.write(f"godwit {version('godwit-dr')}\n")
        context.exit()


@click.group(
    cls=LazyGroup,
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 3 degraded or partial, 10 no store, 11 lease held by another "
    "agent, 12 data is damaged, 13 configuration, 14 conversion refused, 130 interrupted.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def root() -> None:
    """Replicate virtual machines to any object store, and bring them back anywhere."""


def run(arguments: Sequence[str], output: Output | None = None) -> int:
    """Run one command and return the exit code. A command returns None for success, or the code it wants."""
    # A mistake in the options is found before click has looked at --json, and must be told as JSON all the same.
    before_operands = list(arguments)[: arguments.index("--")] if "--" in arguments else arguments
    output = output or Output()
    output.json = output.json or "--json" in before_operands
    try:
        code = root.main(list(arguments), prog_name="godwit", standalone_mode=False, obj=output)
        output.stdout.flush()
    except SystemExit as leaving:  # click leaves this way when a pipe's reader has left
        failure.quiet_pipe()
        return leaving.code if isinstance(leaving.code, int) else failure.FAILED
    except BaseException as error:
        return failure.report(error, output)
    return code if isinstance(code, int) else failure.OK


def _interrupt(_: int, __: object) -> None:
    raise KeyboardInterrupt


def _deliver_again(unraisable: UnraisableHookArgs) -> None:
    """Ask again for an interruption that came where Python can raise nothing, in a finaliser or a callback.

    Python's own hook would print a traceback there and forget about it, and the command would run on.
    """
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        # Not at once: this very call is one of the places where nothing can be raised.
        again = threading.Timer(0.02, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """Run the command line of this process."""
    # Being asked to end is handled as Ctrl-C is: what is half done is thrown away, no temporary file stays.
    signal.signal(signal.SIGTERM, _interrupt)
    # Or numpy starts a thread for each processor for an algebra that nobody asks of it here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.unraisablehook = _deliver_again
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a name that the terminal cannot show is written escaped, not refused
            reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    # The work is done and its exit code stands: from here on an interruption would only spoil the answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if code == failure.INTERRUPTED:
        from vhdx.temporary import sweep_temporaries  # noqa: PLC0415 - needed by few

        sweep_temporaries()
    gc.freeze()  # or the interpreter, on its way out, searches for garbage in all that was imported
    try:
        sys.stderr.flush()
    except OSError:
        os._exit(code)
    sys.exit(code)
