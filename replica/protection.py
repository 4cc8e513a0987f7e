"""What `protect` does: looks at the disks, describes the machine they belong to, and records both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from conversion.gpt import is_uefi_boot_disk
from replica import catalog, holds, retention, seeding
from replica.block import LARGEST_DISK_BYTES
from replica.catalog import ProtectedVm
from replica.errors import UsageError
from replica.failover import transitions
from replica.failover.transitions import Command
from replica.generation.convertibility import Convertibility
from replica.history import newest
from replica.host import Host
from replica.keys import VmKeys
from replica.model import Machine, Nic, Point, Settings, SourceDisk
from replica.source import OpenDisk, change_source, is_live, looked_at, name_of, open_for_reading
from replica.stores.store import Store
from replica.tracking import FILES
from replica.vault import Vault
from vhdx.disk import Disk
from vhdx.formats import chain_of

SHORTEST_INTERVAL_SECONDS: Final = 10
LEVELS: Final = range(-7, 20)


@dataclass(frozen=True, slots=True)
class MachineWishes:
    """What was said of the machine; None is inferred or left as it is."""

    generation: Literal[1, 2] | None = None
    cpus: int | None = None
    memory_bytes: int | None = None
    nics: tuple[Nic, ...] | None = None
    secure_boot: bool | None = None


def protect(
    store: Store,
    host: Host,
    *,
    tenant: str,
    name: str,
    disks: Sequence[Path | str],
    buses: Mapping[str, str] | None = None,
    wishes: MachineWishes = MachineWishes(),
    interval_seconds: int = 300,
    compression_level: int = 1,
    keep: str | None = None,
    seed_from: str | None = None,
    vault: Vault | None = None,
    open_disk: OpenDisk = open_for_reading,
) -> tuple[ProtectedVm, Settings]:
    """Begin to protect the VM whose disks these are, the boot disk first. Nothing is copied yet.

    Disks are files, or addresses of a machine's disks (``replica.qemu.LiveAddress``, ``LibvirtAddress`` as text).
    ``buses`` tells by address what some are attached to.

    With ``vault``, the one that stands before ``store``, the VM is encrypted; raises TenantKeyError then.
    ``keep`` is the retention rule, None for the default. ``seed_from``, ``NAME`` or ``NAME@POINT``, is another VM of
    the tenant: the first point refers to what it holds, where that is the same.
    Raises UsageError for contradictions and a name that is taken, DiskError for a file that is no disk.
    """
    if not disks:
        raise UsageError("a VM needs at least one disk", hint="name it with --disk PATH")
    _check(interval_seconds, compression_level)
    rule = _rule(keep)
    catalog.read_store(store)
    seed = None if seed_from is None else seeding.choose(store, tenant, seed_from, encrypted=vault is not None)
    sources = _attached(number_disks((), disks, next_number=0), buses)
    generation = look_at(sources, open_disk)
    machine = describe(Machine(wishes.generation or generation), wishes)
    found = catalog.protect(
        store,
        host,
        tenant=tenant,
        name=name,
        machine=machine,
        sources=sources,
        interval_seconds=interval_seconds,
        compression_level=compression_level,
        retention=rule,
        seed=seed,
        vault=vault,
    )
    if seed is not None:  # the first cycle does so too: what is cut off before this line costs room at the most
        holds.hold(store, host, VmKeys(tenant, seed.vm_id), seed.point, found.keys)
    return found, catalog.settings_in_force(store, found)


def update(
    store: Store,
    host: Host,
    found: ProtectedVm,
    *,
    disks: Sequence[Path | str] = (),
    buses: Mapping[str, str] | None = None,
    wishes: MachineWishes = MachineWishes(),
    interval_seconds: int | None = None,
    compression_level: int | None = None,
    keep: str | None = None,
    open_disk: OpenDisk = open_for_reading,
) -> Settings:
    """Change how a VM is protected. ``disks``, where given, are all its disks from now on; history stays.

    A disk whose path is known keeps its number, so that its next point is a delta. Disks do not change
    while a recovery machine counts. Raises UsageError, LeaseHeldError, StandingError.
    """
    before = catalog.settings_in_force(store, found)
    _check(
        interval_seconds or before.interval_seconds,
        before.compression_level if compression_level is None else compression_level,
    )
    rule = _rule(keep)
    sources = None
    if disks:
        transitions.require(found.vm.name, before.state, Command.CHANGE_DISKS)
        related = lineage(before.sources, newest(store, found.keys), open_disk)
        numbered = number_disks(before.sources, disks, next_number=before.next_disk_number, lineage=related)
        sources = _attached(numbered, buses)
        look_at(sources, open_disk)
    return catalog.update_settings(
        store,
        host,
        found,
        machine=describe(before.machine, wishes),
        sources=sources,
        interval_seconds=interval_seconds,
        compression_level=compression_level,
        retention=rule,
        based_on=before.version,
    )


def _rule(keep: str | None) -> str | None:
    """Return a retention rule in its usual form. Raises UsageError."""
    return None if keep is None else str(retention.parse(keep))


def _check(interval_seconds: int, compression_level: int) -> None:
    if interval_seconds < SHORTEST_INTERVAL_SECONDS:
        raise UsageError(f"an interval of {interval_seconds} s is too short", hint="10 seconds is the least")
    if compression_level not in LEVELS:
        raise UsageError(f"compression level {compression_level} does not exist", hint="choose from -7 to 19")


def number_disks(
    known: Iterable[SourceDisk],
    paths: Sequence[Path | str],
    *,
    next_number: int,
    lineage: Callable[[Path], SourceDisk | None] = lambda path: None,
) -> tuple[SourceDisk, ...]:
    """Return the disks with numbers: those known by path or lineage keep theirs, new ones count from ``next_number``.

    ``lineage`` tells which known disk a file of another name is a later or earlier state of.
    Raises UsageError where a file is named twice, or in a way that no JSON can hold.
    """
    known = tuple(known)
    by_path = {one.path: one for one in known}
    disks: list[SourceDisk] = []
    names: set[str] = set()
    for given in paths:
        live = isinstance(given, str) and is_live(given)
        path = str(given if live else Path(given).absolute())
        if any(0xD800 <= ord(c) < 0xE000 for c in path):  # how Python spells bytes that are no UTF-8
            raise UsageError(f"{path}: the file's path is not valid Unicode", hint="rename the file or its folder")
        if any(one.path == path for one in disks):
            raise UsageError(f"{path} is named twice", hint="name each disk once")
        disk = by_path.get(path)
        if disk is None:
            relative = _same_node(known, path) if live else lineage(Path(path))
            if relative is not None and all(one.number != relative.number for one in disks):
                disk = replace(relative, path=path)
        if disk is None:
            disk = SourceDisk(next_number, name_of(path), path)
            next_number += 1
        while disk.name in names:
            disk = replace(disk, name=f"{disk.name}-{disk.number}")
        names.add(disk.name)
        disks.append(disk)
    return tuple(disks)


def _attached(sources: tuple[SourceDisk, ...], buses: Mapping[str, str] | None) -> tuple[SourceDisk, ...]:
    """Return the disks with the bus that each is attached to, where it is told."""
    return tuple(replace(one, bus=(buses or {}).get(one.path, one.bus)) for one in sources)


def _same_node(known: Iterable[SourceDisk], path: str) -> SourceDisk | None:
    """Return the known disk of a running machine that has this node's name: sockets may move."""
    found = [one for one in known if is_live(one.path) and name_of(one.path) == name_of(path)]
    return found[0] if len(found) == 1 else None


def lineage(
    known: Sequence[SourceDisk], newest_point: Point | None, open_disk: OpenDisk
) -> Callable[[Path], SourceDisk | None]:
    """Return what tells whether a file of a new name is a state of a known disk.

    It is where the known file is a parent of it, as after a checkpoint; or else where it and the newest point of just
    one known disk have a file in common, as after checkpoints were merged or reverted.
    """
    earlier = (
        {disk.number: disk.source.get(FILES, "").split("\n") for disk in newest_point.disks} if newest_point else {}
    )

    def find(path: Path) -> SourceDisk | None:
        with open_disk(path) as disk:
            files = {str(one.absolute()) for one in chain_of(disk)}
        above = [one for one in known if one.path in files]
        beside = [one for one in known if files.intersection(earlier.get(one.number, ()))]
        found = above or beside
        return found[0] if len(found) == 1 else None

    return find


def look_at(sources: Iterable[SourceDisk], open_disk: OpenDisk) -> Literal[1, 2]:
    """Open each disk, read its ends, and tell the machine's generation: 2 where the first has an EFI system partition.

    Raises DiskError, SourceError for what cannot be read, so that it is known now and not in the first cycle.
    """
    sources = tuple(sources)
    change_source(sources)
    generations: list[Literal[1, 2]] = []
    for source in sources:
        with looked_at(source.path, open_disk) as disk:
            _check_size(disk)
            disk.read_at(disk.size - disk.sector_size, disk.sector_size)
            generations.append(2 if is_uefi_boot_disk(disk) else 1)
    return generations[0]


def verdict_on(settings: Settings, host: Host, open_disk: OpenDisk = open_for_reading) -> Convertibility | None:
    """Return whether the machine can be started as Generation 1, too; None where its disks are no files here.

    Disks of running machines are not looked at, at no certain instant: the first cycle tells. Never raises.
    """
    sources = sorted(settings.sources, key=lambda one: one.number)
    if not host.inspects or not all(_is_file(one.path) for one in sources):
        return None
    from replica.generation.verdict import judged  # noqa: PLC0415 - takes long to import, and most need it not

    with ExitStack() as stack:
        disks = ((one.number, stack.enter_context(looked_at(one.path, open_disk))) for one in sources)
        generation, clock = settings.machine.generation, host.clock
        return judged(disks, generation=generation, now=clock.now(), monotonic=clock.monotonic)


def _is_file(path: str) -> bool:
    return not is_live(path) and Path(path).is_file()


def _check_size(disk: Disk) -> None:
    if not disk.sector_size <= disk.size <= LARGEST_DISK_BYTES:
        raise UsageError(f"{disk.path}: a disk of {disk.size} bytes cannot be protected", hint="64 TiB is the most")


def describe(machine: Machine, wishes: MachineWishes) -> Machine:
    """Return the machine with what was said of it. Raises UsageError for contradictions."""
    described = replace(
        machine,
        generation=wishes.generation or machine.generation,
        cpus=wishes.cpus or machine.cpus,
        memory_bytes=wishes.memory_bytes or machine.memory_bytes,
        nics=machine.nics if wishes.nics is None else wishes.nics,
        secure_boot=machine.secure_boot if wishes.secure_boot is None else wishes.secure_boot,
    )
    if described.secure_boot and described.generation == 1:
        raise UsageError("Secure Boot needs a machine of Generation 2", hint="leave one of the two out")
    return described
