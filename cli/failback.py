"""godwit reprotect, failback and adopt: a VM replicated from where it is now, and brought home."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cli.failover import means_of, show_standing, warn_of_left
from cli.output import Output, output_options
from cli.session import Session, store_options
from cli.sizes import human_size
from replica import catalog
from replica.failback.examination import Touched
from replica.failover import adoption, returning, transitions
from replica.failover.homecoming import Destination, bring, look_ahead
from replica.failover.transitions import Command
from replica.libvirt.protecting import find_domain
from replica.model import Identity, Standing
from replica.protection import MachineWishes


@click.command()
@click.argument("name")
@store_options
@output_options
def reprotect(output: Output, name: str, *, session: Session) -> None:
    """Replicate the VM NAME from its recovery machine from now on: only what it has changed is sent."""
    store = session.store()
    means = means_of(session, store, name)
    returning.reprotect(means)
    show_standing(output, store, means)


@click.command()
@click.argument("name")
@click.option(
    "--to",
    "to",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A new disk file of a fresh host; one for each disk, in their order.  [default: the disks that it had]",
)
@click.option("--lost", is_flag=True, help="The recovery machine is lost: bring home the newest point as it is.")
@click.option("--keep-old", is_flag=True, help="Keep the old home disks beside the new ones.")
@click.option("--yes", is_flag=True, help="Do not ask, not even where a home disk was written to meanwhile.")
@store_options
@output_options
def failback(
    output: Output,
    name: str,
    to: tuple[Path, ...],
    lost: bool,
    keep_old: bool,
    yes: bool,
    *,
    session: Session,
) -> None:
    """Bring the VM NAME home: shut its recovery machine down, and make its old disks what they are to be.

    Only what differs is read from the store. Interrupted at any moment, the old disks start as before or the new ones
    are there; the same command goes on.
    """
    store = session.store()
    means = means_of(session, store, name)
    state = catalog.settings_in_force(store, means.found).state
    transitions.require(name, state, Command.FAILBACK)
    if state.standing is Standing.REPROTECTED:
        look_ahead(means, state, Destination(to))
        output.confirm(f"Shut down the recovery machine of {name}, and bring it home?", yes=yes)

    def may_overwrite(touched: Touched) -> bool:
        if not yes and sys.stdin.isatty():  # where nobody can be asked the answer is no
            question = f"{touched.path} was written to since it was left; overwrite {human_size(touched.bytes)}?"
            output.confirm(question, yes=False)
        return yes or sys.stdin.isatty()

    destination = Destination(to, may_overwrite, keep_old)
    with output.progress(name) as progress:
        done = returning.failback(
            means,
            lambda means_, state_, newest, report: bring(means_, state_, newest, destination, report),
            lost=lost,
            progress=progress,
        )
    if not output.json and done.homecoming is not None:
        for one in done.homecoming.disks:
            output.line(
                f"  disk {one.number}: {one.path} ({human_size(one.differing_bytes)} differed, "
                f"{human_size(one.written_bytes)} written)"
            )
    if done.homecoming is not None and not output.json:
        output.line(f"  {name} is off: start it at home; it is replicated from there again")
    warn_of_left(output, done.left)
    homecoming = None if done.homecoming is None else done.homecoming.document()
    point = None if done.point is None else done.point.point
    show_standing(output, store, means, {"homecoming": homecoming, "point": point})


@click.command()
@click.argument("name")
@click.option(
    "--disk", "disks", multiple=True, type=click.Path(path_type=Path, readable=False), metavar="PATH",
    help="Where a disk of the VM is now; with --libvirt a target. All of them, in any order.",
)  # fmt: skip
@click.option("--libvirt", metavar="DOMAIN", help="The VM is this domain of libvirt now.")
@click.option("--connect", metavar="URI", help="With --libvirt: the connection.  [default: libvirt's own]")
@click.option("--bios-uuid", metavar="UUID", help="The BIOS UUID that the machine has now.")
@click.option("--hypervisor-id", default="", metavar="ID", help="What its hypervisor calls it now, for the record.")
@click.option("--dry-run", is_flag=True, help="Say which disks are recognised by what, and change nothing.")
@store_options
@output_options
def adopt(
    output: Output,
    name: str,
    disks: tuple[Path, ...],
    libvirt: str | None,
    connect: str | None,
    bios_uuid: str | None,
    hypervisor_id: str,
    dry_run: bool,
    *,
    session: Session,
) -> None:
    """Join a VM that came back under another id, restored, imported anew or moved, to the protected VM NAME.

    Its disks are told by what is in them. Its history goes on, and nothing is replicated anew.
    """
    if connect is not None and libvirt is None:
        raise click.UsageError("--connect goes with --libvirt")
    if not disks and libvirt is None:
        raise click.UsageError("name the VM's disks with --disk, or its domain with --libvirt")
    store = session.store()
    means = means_of(session, store, name)
    given: list[Path | str] = list(disks)
    platform = ""
    if libvirt is not None:
        domain = find_domain(libvirt, connect=connect, targets=tuple(str(one) for one in disks), wishes=MachineWishes())
        given, platform = [*domain.disks], "libvirt"
        hypervisor_id = hypervisor_id or libvirt
    done = adoption.adopt(means, given, Identity(platform, hypervisor_id, bios_uuid or ""), dry_run=dry_run)
    document = {
        "vm": name,
        "dry_run": dry_run,
        "disks": [
            {"number": one.source.number, "path": one.source.path, "was": one.was, "because": one.because}
            for one in done.disks
        ],
    }

    def render() -> None:
        output.line(f"{name} {'would be' if dry_run else 'is'} replicated from")
        for one in done.disks:
            output.line(f"  disk {one.source.number}: {one.source.path} ({one.because}; was {one.was})")

    output.show(document, render)
