"""The values that recovery points are made of: machines, disks, maps and points."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal

from replica.block import Digest
from replica.generation.convertibility import Convertibility
from replica.keys import PartId


class Consistency(StrEnum):
    """What a guest finds when it starts from a point."""

    CRASH = "crash"  # as after a power failure
    APPLICATION = "application"  # file systems and applications were quiesced
    OFFLINE = "offline"  # the VM was off


@dataclass(frozen=True, slots=True)
class Nic:
    """A network adapter. ``mac`` is six hex pairs with colons, or None where the platform is to choose."""

    mac: str | None = None
    network: str | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """What is needed to start the VM anywhere, beside its disks."""

    generation: Literal[1, 2]
    cpus: int = 2
    memory_bytes: int = 2 << 30
    nics: tuple[Nic, ...] = ()
    secure_boot: bool = False

    @property
    def firmware(self) -> Literal["bios", "uefi"]:
        """What starts the VM."""
        return "uefi" if self.generation == 2 else "bios"


@dataclass(frozen=True, slots=True)
class SourceDisk:
    """Where a protected disk is read from."""

    number: int
    name: str
    path: str
    bus: str = "scsi"


@dataclass(frozen=True, slots=True)
class SeedRef:
    """A point of another VM, whose equal blocks a VM's first point refers to."""

    vm_id: str
    point: int


class Standing(StrEnum):
    """Where a VM stands between its source and a recovery machine (docs/failover.md)."""

    PROTECTED = "protected"
    FAILING_OVER = "failing-over"
    FAILED_OVER = "failed-over"
    COMMITTED = "committed"
    REPROTECTED = "reprotected"
    FAILING_BACK = "failing-back"


class FailoverKind(StrEnum):
    """What a recovery machine was started for."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"


@dataclass(frozen=True, slots=True)
class ConversionRef:
    """The manifest of the conversion of a disk, as it was in a point, to another generation."""

    point: int
    disk: int


@dataclass(frozen=True, slots=True)
class MachineDisk:
    """A disk of a recovery machine; ``address`` as ``godwit protect --disk`` takes it."""

    number: int
    address: str


@dataclass(frozen=True, slots=True)
class Identity:
    """By what a machine is known to others than us; what is not known is empty."""

    platform: str
    hypervisor_id: str = ""
    bios_uuid: str = ""
    macs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecoveryMachine:
    """A machine that a failover made, or is about to make. ``name`` is what its platform calls it."""

    name: str
    platform: str
    kind: FailoverKind
    point: int  # that it starts from
    generation: Literal[1, 2]
    isolated: bool
    host_id: str  # of the host whose platform it is
    host_name: str
    begun_at: datetime
    bitmap: str | None = None  # that records what is written to its disks since its start
    conversions: tuple[ConversionRef, ...] = ()
    disks: tuple[MachineDisk, ...] = ()  # known once it has been started


@dataclass(frozen=True, slots=True)
class Home:
    """What a VM is brought home to: its machine and source disks, and the last ``point`` that was made of them."""

    machine: Machine
    sources: tuple[SourceDisk, ...]
    point: int


@dataclass(frozen=True, slots=True)
class ReverseBase:
    """What the disks of a recovery machine are compared with: its changes since ``point`` are known.

    They are what ``bitmap`` recorded on each disk, None where nothing did, and the ranges that ``conversions`` wrote.
    """

    point: int
    bitmap: str | None
    conversions: tuple[ConversionRef, ...]


@dataclass(frozen=True, slots=True)
class State:
    """Where a VM stands, and the machines that there are of it beside its source."""

    standing: Standing = Standing.PROTECTED
    machine: RecoveryMachine | None = None  # the one that counts, or that is being started
    beside: tuple[RecoveryMachine, ...] = ()  # those that do not count: tests, and others until they are removed
    home: Home | None = None  # known from the intent to fail over on
    reverse: ReverseBase | None = None  # while it is replicated from the recovery machine

    @property
    def points(self) -> frozenset[int]:
        """The points that machines were started from, or that home disks are told by: they are not to be pruned."""
        machines = (*self.beside, *(() if self.machine is None else (self.machine,)))
        return frozenset({one.point for one in machines} | (set() if self.home is None else {self.home.point}))

    @property
    def conversions(self) -> tuple[ConversionRef, ...]:
        """The conversions that anything still refers to."""
        machines = (*self.beside, *(() if self.machine is None else (self.machine,)))
        return tuple(dict.fromkeys(ref for one in machines for ref in one.conversions))


@dataclass(frozen=True, slots=True)
class Change:
    """Who made a version of the settings by which command, and which identities of the VM that brought to light."""

    command: str
    at: datetime
    host_id: str
    host_name: str
    identities: tuple[Identity, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """How a VM is protected, and where it stands; one immutable version of it."""

    version: int
    machine: Machine
    sources: tuple[SourceDisk, ...]
    next_disk_number: int
    interval_seconds: int = 300
    compression_level: int = 1
    retention: str | None = None  # the rule as text; None is the default
    seed: SeedRef | None = None
    state: State = State()
    change: Change | None = None  # what made this version; None for the first
    previous: int = 0  # the version that was in force before; 0 for none


@dataclass(frozen=True, slots=True)
class Vm:
    """What never changes about a protected VM."""

    vm_id: str
    name: str
    created_at: datetime
    hash_seed: int


@dataclass(frozen=True, slots=True)
class MapPartRef:
    """A map part as a manifest names it."""

    part: PartId
    entries: int
    first_key: int
    last_key: int
    size: int  # bytes
    checksum: str  # xxh3-128 of the object, hex


@dataclass(frozen=True, slots=True)
class MapRef:
    """A map as a manifest names it."""

    level: int
    parts: tuple[MapPartRef, ...]

    @property
    def entries(self) -> int:
        """How many entries its parts hold."""
        return sum(part.entries for part in self.parts)


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """A disk as one recovery point holds it."""

    number: int
    name: str
    size: int  # bytes
    sector_size: int  # bytes
    format: str
    bus: str
    data_blocks: int
    digest: Digest
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CycleStatistics:
    """What a cycle did."""

    read_bytes: int = 0
    changed_blocks: int = 0
    zero_blocks: int = 0
    reused_blocks: int = 0
    stored_bytes: int = 0
    segments: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """A recovery point: a restorable instant of a whole VM."""

    vm_id: str
    point: int
    epoch: int
    previous: int
    created_at: datetime
    published_at: datetime
    consistency: Consistency
    vm_name: str
    machine: Machine
    disks: tuple[DiskRecord, ...]
    maps: tuple[MapRef, ...]
    cycle: CycleStatistics
    convertibility: Convertibility | None = None  # None where nothing inspected the disks
    repeats: int = 0  # the point of a cycle whose content gc stored anew in this one; 0 for one that a cycle made

    @property
    def origin(self) -> int:
        """The point that a cycle made of what this one holds: this one, or the one that it repeats."""
        return self.repeats or self.point

    @property
    def size(self) -> int:
        """Virtual size of all disks, bytes."""
        return sum(disk.size for disk in self.disks)


@dataclass(frozen=True, slots=True)
class Fence:
    """A manifest that is no point: it occupies a number so that no older epoch can publish there."""

    vm_id: str
    point: int
    epoch: int
    published_at: datetime
