"""godwit protect and status: which VMs are protected, from what, and how they stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from cli import convertibility
from cli.output import Output, output_options
from cli.session import Duration, Session, duration_text, store_options
from cli.sizes import SIZE, human_size
from replica import catalog, manifest
from replica import protection as protect_disks
from replica.catalog import ProtectedVm
from replica.checkpoints.chains import newer_files
from replica.daemon import localagent
from replica.daemon.localagent import LocalAgent
from replica.errors import GodwitError
from replica.failover import description
from replica.failover.offer import configured
from replica.history import newest
from replica.model import Machine, Nic, Point, Settings
from replica.protection import MachineWishes
from replica.retention import DEFAULT_TEXT
from replica.stores.store import Store


@click.command()
@click.argument("name")
@click.option(
    "--disk",
    "disks",
    multiple=True,
    type=click.Path(path_type=Path, readable=False),
    metavar="PATH",
    help="A disk of the VM: VHDX, AVHDX, VHD or raw; with --qmp a block node; with --libvirt a target, such as vda;"
    " with --hyperv a place, such as scsi-0-1."
    " The boot disk first. May be repeated.",
)
@click.option(
    "--qmp",
    metavar="SOCKET",
    help="The VM runs under QEMU, and this is its monitor's socket: --disk names block nodes.",
)
@click.option(
    "--guest-agent",
    metavar="SOCKET",
    help="With --qmp: the socket of the QEMU guest agent, by which file systems are frozen for the instant.",
)
@click.option(
    "--libvirt",
    metavar="DOMAIN",
    help="The VM is a domain of libvirt, which describes the machine and its disks; --disk chooses among them.",
)
@click.option("--connect", metavar="URI", help="With --libvirt: the connection.  [default: libvirt's own]")
@click.option(
    "--no-freeze",
    is_flag=True,
    help="With --libvirt or --hyperv: do not quiesce the guest for the instant, though that could be done.",
)
@click.option(
    "--hyperv",
    metavar="VM",
    help="The VM is on a Hyper-V host, which describes the machine and its disks; --disk chooses among them."
    " By its name or identifier. Never run against a real host yet.",
)
@click.option(
    "--host",
    metavar="HOST",
    help="With --hyperv: the host, reached by PowerShell remoting over HTTPS, or http://HOST.  [default: this machine]",
)
@click.option(
    "--host-path",
    "host_paths",
    multiple=True,
    metavar="THERE=HERE",
    help="With --hyperv: where a folder of the host is reached from here, such as C:\\VMs=/mnt/vms. May be repeated.",
)
@click.option(
    "--only-frozen", is_flag=True, help="With --hyperv: no recovery point where the guest cannot be quiesced."
)
@click.option(
    "--checkpoints",
    is_flag=True,
    help="With --hyperv: make no checkpoints, but read the newest that somebody else made.",
)
@click.option("--every", type=Duration(), help="The interval between recovery points.  [default: 5m]")
@click.option("--generation", type=click.Choice(["1", "2"]), help="1 is BIOS, 2 is UEFI.  [default: by the boot disk]")
@click.option("--cpus", type=click.IntRange(1, 4096), help="Processors of the machine.  [default: 2]")
@click.option("--memory", type=SIZE, help="Memory of the machine, such as 4G.  [default: 2G]")
@click.option("--nic", "nics", multiple=True, metavar="MAC[@NETWORK]", help="A network adapter. May be repeated.")
@click.option("--secure-boot/--no-secure-boot", default=None, help="Whether the machine has Secure Boot.")
@click.option("--level", type=click.IntRange(-7, 19), help="The zstd compression level.  [default: 1]")
@click.option("--keep", metavar="RULE", help="Which points 'godwit prune' keeps.  [default: " + DEFAULT_TEXT + "]")
@click.option(
    "--seed-from",
    metavar="NAME[@POINT]",
    help="Another VM, such as its template: what its point holds already is not stored again.",
)
@click.option("--encrypt", is_flag=True, help="Encrypt everything that is stored of the VM.")
@click.option("--update", is_flag=True, help="Change how a VM is protected that already is; its history stays.")
@store_options
@output_options
def protect(
    output: Output,
    name: str,
    disks: tuple[Path, ...],
    qmp: str | None,
    guest_agent: str | None,
    libvirt: str | None,
    connect: str | None,
    no_freeze: bool,
    hyperv: str | None,
    host: str | None,
    host_paths: tuple[str, ...],
    only_frozen: bool,
    checkpoints: bool,
    every: int | None,
    generation: str | None,
    cpus: int | None,
    memory: int | None,
    nics: tuple[str, ...],
    secure_boot: bool | None,
    level: int | None,
    keep: str | None,
    seed_from: str | None,
    encrypt: bool,
    update: bool,
    *,
    session: Session,
) -> None:
    """Protect the VM NAME: disk files, block nodes of a running QEMU, a libvirt domain, or a VM on a Hyper-V host.

    This records the disks and the machine that they belong to; 'godwit replicate NAME' then makes recovery points.
    """
    wishes = MachineWishes(_generation(generation), cpus, memory, _nics(nics), secure_boot)
    if hyperv is not None:
        if qmp or guest_agent or libvirt or connect:
            raise click.UsageError("--hyperv does without --qmp, --guest-agent, --libvirt and --connect")
        taken = _take(no_freeze=no_freeze, only_frozen=only_frozen, checkpoints=checkpoints)
        origin = _hyperv_origin(hyperv, disks, wishes, host, taken, host_paths)
    elif host or host_paths or only_frozen or checkpoints:
        raise click.UsageError("--host, --host-path, --only-frozen and --checkpoints go with --hyperv")
    else:
        origin = _origin(disks, wishes, qmp, guest_agent, libvirt, connect, freeze=not no_freeze)
    store = session.store()
    if update:
        if encrypt:
            raise click.UsageError("whether a VM is encrypted is settled when it is protected, and stays")
        if seed_from is not None:
            raise click.UsageError("a VM is seeded when it is protected, not later")
        found = session.vm(store, name)
        settings = protect_disks.update(
            store,
            session.host,
            found,
            disks=origin.disks,
            buses=origin.buses,
            wishes=origin.machine,
            interval_seconds=every,
            compression_level=level,
            keep=keep,
        )
    else:
        found, settings = protect_disks.protect(
            store,
            session.host,
            tenant=session.configuration.tenant,
            name=name,
            disks=origin.disks,
            buses=origin.buses,
            wishes=origin.machine,
            interval_seconds=every or 300,
            compression_level=1 if level is None else level,
            keep=keep,
            seed_from=seed_from,
            vault=session.vault if encrypt else None,
        )

    verdict = protect_disks.verdict_on(settings, session.host)
    newer = newer_files(settings.sources)

    def render() -> None:
        output.line(f"{name} is protected: a recovery point is wanted every {duration_text(settings.interval_seconds)}")
        _render_machine(output, settings.machine)
        for one in settings.sources:
            output.line(f"  disk {one.number}: {one.path}")
        for finding in verdict.refusals if verdict is not None else ():
            said = f"{finding.message} [{finding.rule}: {finding.subject}]"
            output.note(f"could not be recovered as Generation 1: {said}")
        if origin.left_out:
            output.note(f"left out, as they cannot be protected: {', '.join(origin.left_out)}")
        for path, files in newer.items():
            output.note(f"{path} is not the newest of its chain: {', '.join(files)} stand above it")
            output.note("  if the VM runs on one of them: say --update, with --disk and that path for every disk")
        output.note(f"next: godwit replicate {name} --store {store.url}")

    document = {
        **_settings_document(found, settings),
        "newer_files": newer,
        "encrypted": session.vault.is_encrypted(found.keys),
        "convertibility": None if verdict is None else verdict.document(),
    }
    output.show(document, render)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the VM comes from."""

    disks: list[Path | str]
    machine: MachineWishes
    buses: dict[str, str] | None = None
    left_out: tuple[str, ...] = ()


def _origin(
    disks: tuple[Path, ...],
    wishes: MachineWishes,
    qmp: str | None,
    guest_agent: str | None,
    libvirt: str | None,
    connect: str | None,
    *,
    freeze: bool,
) -> _Origin:
    if libvirt is None:
        if connect is not None or not freeze:
            raise click.UsageError("--connect and --no-freeze go with --libvirt")
        return _Origin(_places(disks, qmp, guest_agent), wishes)
    if qmp is not None or guest_agent is not None:
        raise click.UsageError("--libvirt does without --qmp and --guest-agent")
    from replica.libvirt.protecting import find_domain  # noqa: PLC0415 - other commands start without

    targets = tuple(str(disk) for disk in disks)
    domain = find_domain(libvirt, connect=connect, targets=targets, freeze=freeze, wishes=wishes)
    return _Origin([*domain.disks], domain.machine, domain.buses, domain.left_out)


def _take(*, no_freeze: bool, only_frozen: bool, checkpoints: bool) -> str:
    if no_freeze + only_frozen + checkpoints > 1:
        raise click.UsageError("choose one of --no-freeze, --only-frozen and --checkpoints")
    return "crash" if no_freeze else "application" if only_frozen else "checkpoint" if checkpoints else "either"


def _hyperv_origin(
    vm: str,
    disks: tuple[Path, ...],
    wishes: MachineWishes,
    host: str | None,
    take: str,
    maps: tuple[str, ...],
) -> _Origin:
    from replica.hyperv.address import Take  # noqa: PLC0415 - other commands start without
    from replica.hyperv.protecting import find_vm  # noqa: PLC0415

    positions = tuple(str(disk) for disk in disks)
    found = find_vm(vm, host=host, positions=positions, take=Take(take), maps=maps, wishes=wishes)
    return _Origin([*found.disks], found.machine, found.buses, found.left_out)


def _places(disks: tuple[Path, ...], qmp: str | None, guest_agent: str | None) -> list[Path | str]:
    if qmp is None:
        if guest_agent is not None:
            raise click.UsageError("--guest-agent goes with --qmp")
        return list(disks)
    if not disks:
        raise click.UsageError("with --qmp, name the block nodes with --disk")
    from replica.qemu import LiveAddress  # noqa: PLC0415 - sockets, which other commands start without

    agent = None if guest_agent is None else str(Path(guest_agent).absolute())
    return [str(LiveAddress(str(Path(qmp).absolute()), str(disk), agent)) for disk in disks]


def _generation(text: str | None) -> Literal[1, 2] | None:
    return None if text is None else (2 if text == "2" else 1)


def _nics(written: tuple[str, ...]) -> tuple[Nic, ...] | None:
    nics = []
    for one in written:
        mac, _, network = one.partition("@")
        pairs = mac.lower().replace("-", ":").split(":")
        if len(pairs) != 6 or not all(len(p) == 2 and set(p) <= set("0123456789abcdef") for p in pairs):
            raise click.BadParameter(f"{one!r} is no network adapter: write 00:15:5d:01:02:03 or 00:15:5d:01:02:03@LAN")
        nics.append(Nic(":".join(pairs), network or None))
    return tuple(nics) or None


def _cpus(number: int) -> str:
    return "1 CPU" if number == 1 else f"{number} CPUs"


def _render_machine(output: Output, machine: Machine) -> None:
    secure = ", Secure Boot" if machine.secure_boot else ""
    output.line(
        f"  machine: Generation {machine.generation} ({machine.firmware.upper()}{secure}), "
        f"{_cpus(machine.cpus)}, {human_size(machine.memory_bytes)} of memory"
    )
    for nic in machine.nics:
        output.line(f"  network adapter: {nic.mac}{f' on {nic.network}' if nic.network else ''}")


def _settings_document(found: ProtectedVm, settings: Settings) -> dict[str, Any]:
    return {
        "name": found.vm.name,
        "vm_id": found.vm.vm_id,
        "settings_version": settings.version,
        "interval_seconds": settings.interval_seconds,
        "compression_level": settings.compression_level,
        "retention": settings.retention or DEFAULT_TEXT,
        "machine": manifest.encode_machine(settings.machine),
        "disks": [{"number": one.number, "name": one.name, "path": one.path} for one in settings.sources],
    }


@click.command()
@click.argument("name", required=False)
@store_options
@output_options
def status(output: Output, name: str | None, *, session: Session) -> int | None:
    """Show the protected VMs, or the VM NAME: its newest point, disks and machine, and what can be done next."""
    store = session.store()
    catalog.read_store(store)
    names = [name] if name else list(catalog.names(store, session.configuration.tenant))
    rows: list[dict[str, Any]] = []
    for one in names:
        try:
            rows.append(_status_of(store, session, one))
        except GodwitError as error:
            if name:
                raise
            rows.append({"name": one, "error": str(error)})

    agent, now = _local_agent(session), session.host.clock.now()
    told = None if agent is None else localagent.document(agent, now, name)
    doing = None if agent is None else localagent.sentence(agent, now, name)

    def render() -> None:
        if name:
            _render_status(output, {**rows[0], "agent": doing})
        elif not rows:
            output.note("no VM is protected in this store yet: godwit protect NAME --disk PATH")
        else:
            output.table(
                ["VM", "newest point", "RPO", "wanted", "disks", "size", "note"],
                [_status_row(row) for row in rows],
                right=(1, 2, 3, 4, 5),
            )
        if doing is not None and not name:
            output.note(f"agent on this machine: {doing}")

    output.show({**rows[0], "agent": told} if name else {"vms": rows, "agent": told}, render)
    return 3 if any("error" in row for row in rows) else None


def _local_agent(session: Session) -> LocalAgent | None:
    configuration = session.configuration
    return localagent.read(session.host.state_folder, configuration.store, configuration.tenant)


def _status_of(store: Store, session: Session, name: str) -> dict[str, Any]:
    found = session.vm(store, name)
    settings = catalog.settings_in_force(store, found)
    point = newest(store, found.keys)
    return {
        **_settings_document(found, settings),
        "encrypted": session.vault.is_encrypted(found.keys),
        "protected_since": found.vm.created_at,
        "newest_point": point.point if point else None,
        "newest_at": point.created_at if point else None,
        "rpo_seconds": _age(session, point),
        "size_bytes": point.size if point else None,
        "convertibility": point.convertibility.document() if point and point.convertibility else None,
        **description.document(name, settings, configured(session.configuration.platforms)),
    }


def _age(session: Session, point: Point | None) -> int | None:
    return int((session.host.clock.now() - point.created_at).total_seconds()) if point else None


def _status_row(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["name"], "", "", "", "", "", row["error"]]
    if row["newest_point"] is None:
        return [
            row["name"],
            "none",
            "",
            duration_text(row["interval_seconds"]),
            str(len(row["disks"])),
            "",
            "no point yet",
        ]
    late = row["rpo_seconds"] > 2 * row["interval_seconds"]
    return [
        row["name"],
        str(row["newest_point"]),
        duration_text(row["rpo_seconds"]),
        duration_text(row["interval_seconds"]),
        str(len(row["disks"])),
        human_size(row["size_bytes"]),
        ", ".join(filter(None, [description.short(row), "late" if late else ""])),
    ]


def _render_status(output: Output, row: dict[str, Any]) -> None:
    machine = row["machine"]
    newest_text = "none yet"
    if row["newest_point"] is not None:
        newest_text = f"{row['newest_point']}, {duration_text(row['rpo_seconds'])} old"
    output.fields(
        [
            ("VM", row["name"]),
            ("id", row["vm_id"]),
            ("newest point", newest_text),
            ("wanted every", duration_text(row["interval_seconds"])),
            ("kept", row["retention"]),
            ("encrypted", "yes" if row["encrypted"] else "no"),
            (
                "machine",
                f"Generation {machine['generation']}, {_cpus(machine['cpus'])}, {human_size(machine['memory_bytes'])}",
            ),
            ("disks", [f"{disk['number']}: {disk['path']}" for disk in row["disks"]]),
            ("conversion", None if row["newest_point"] is None else convertibility.lines(row["convertibility"])),
            ("agent here", row["agent"]),
            *description.lines(row),
        ]
    )
