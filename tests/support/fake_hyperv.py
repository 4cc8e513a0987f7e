"""A Hyper-V host that is none: VMs whose disks are real VHDX files, and answers as PowerShell 5.1 prints them.

It knows what Microsoft documents: recovery checkpoints freeze the files beneath them; of one, and only of one, a
reference point can be made, which takes the checkpoint away and merges its disks; change tracking tells what was
written since a reference point, or refuses where it does not know it. What it cannot know is whether Hyper-V keeps to
that. The PowerShell of our scripts is executed, by an interpreter of the tests' own (``tests.support.powershell``), on
cmdlets and WMI that are those of this host (``fake_hyperv_cmdlets``, ``fake_hyperv_wmi``).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replica.hyperv import scripts
from replica.hyperv.session import SessionError
from replica.platforms.hyperv import scripts as recovery
from vhdx.create import create_disk
from vhdx.writer import open_writable

RECOVERY, STANDARD = "Recovery", "Standard"
GRAIN = 4096  # what change tracking rounds to
GUEST_SERVICE = "6C09BB55-D683-4DA0-8931-C9BF705F6480"
_IDE = "83F8638B-8DCA-4152-9EDA-2CA8B33039B4"
_DECLARED = re.compile(r"\[Parameter\(Mandatory = \$true\)\] \[AllowEmptyString\(\)\] \[string\]\$(\w+)")


class Killed(BaseException):
    """The agent was killed here."""


class HostFaultError(Exception):
    """What a script reports: a kind, a number, and words in the host's language."""

    def __init__(self, kind: str, code: int = 0, message: str = "Fehler: Der Vorgang konnte nicht ausgeführt werden."):
        super().__init__(message)
        self.kind, self.code, self.message = kind, code, message


@dataclass
class FakeDisk:
    """A disk of a VM. ``files`` are its chain, as the host writes paths, the one that is written to last."""

    host: FakeHost
    controller: str
    number: int
    location: int
    size: int
    files: list[str]
    content: bytearray
    controller_id: str
    log: list[tuple[int, int, int]] = field(default_factory=list)  # instant, first byte, byte after the last
    layers: list[list[tuple[int, bytes]]] = field(default_factory=list)  # of each file but the first
    tracked: dict[str, int] = field(default_factory=dict)  # identifier of tracking → the instant it begins at
    physical: bool = False
    shared: bool = False

    @property
    def position(self) -> str:
        return f"{self.controller.lower()}-{self.number}-{self.location}"

    def identifier(self, owner: str, kind: str) -> str:
        number = self.number if self.controller == "IDE" else 0
        return f"Microsoft:{owner.upper()}\\{self.controller_id}\\{number}\\{self.location}\\{kind}"

    def write(self, offset: int, data: bytes) -> None:
        """What the guest does."""
        with open_writable(self.host.here(self.files[-1])) as disk:
            disk.write_at(offset, data)
            disk.flush()
        self.content[offset : offset + len(data)] = data
        self.log.append((self.host.now, offset, offset + len(data)))
        if self.layers:
            self.layers[-1].append((offset, data))

    def freeze(self, kind: str) -> None:
        """Put a new file above the last."""
        base = self.files[-1].rpartition(".")[0].partition("_")[0]
        above = f"{base}_{str(uuid.uuid4()).upper()}.avhdx"
        create_disk(self.host.here(above), parent=self.host.here(self.files[-1]))
        self.files.append(above)
        self.layers.append([])

    def merge(self, at: int) -> None:
        """Write the file above ``files[at]`` into that, and make those above anew."""
        for path in self.files[at + 1 :]:
            self.host.here(path).unlink()
        with open_writable(self.host.here(self.files[at])) as disk:
            for offset, data in self.layers[at]:
                disk.write_at(offset, data)
            disk.flush()
        if at:
            self.layers[at - 1] += self.layers[at]
        del self.layers[at], self.files[at + 1]
        for number in range(at + 1, len(self.files)):
            here = self.host.here(self.files[number])
            create_disk(here, parent=self.host.here(self.files[number - 1]))
            with open_writable(here) as disk:
                for offset, data in self.layers[number - 1]:
                    disk.write_at(offset, data)
                disk.flush()


@dataclass
class Snapshot:
    """A checkpoint of any type. ``frozen`` are the disks' files that it froze."""

    guid: str
    type: str
    at: int
    frozen: list[str]
    tracked: list[str]

    @property
    def id(self) -> str:
        return f"Microsoft:{self.guid.upper()}"


@dataclass
class ReferencePoint:
    id: str
    type: int
    disks: list[str]
    changes: list[str]


@dataclass
class FakeGuest:
    """What runs in a VM. ``programs`` by name, each given its arguments as one text."""

    user: str = "Administrator"
    password: str = "guest secret"
    windows: bool = True
    up: bool = True
    shuts_down_after: int = 1  # times that it is asked to; 0: never
    has_integration: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    programs: dict[str, Callable[[str], tuple[int, bytes, bytes] | None]] = field(default_factory=dict)


@dataclass
class FakeVm:
    host: FakeHost
    guid: str
    name: str
    generation: int = 2
    version: str = "9.0"
    off: bool = False
    cpus: int = 4
    startup: int = 4 << 30
    assigned: int = 4 << 30
    dynamic: bool = False
    secure: bool = True
    adapters: list[dict[str, Any]] = field(default_factory=list)
    disks: list[FakeDisk] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)  # from the oldest to the newest, one above the other
    references: list[ReferencePoint] = field(default_factory=list)
    asked_levels: list[int] = field(default_factory=list)
    notes: str = ""
    path: str = ""  # of the folder with its configuration
    held: str = ""  # Paused, Saved: neither off nor running
    scsi: int = 1  # controllers
    settings: dict[str, Any] = field(default_factory=dict)  # whatever cmdlets set, by their parameters
    integration: dict[str, bool] = field(default_factory=lambda: {GUEST_SERVICE: False})
    guest: FakeGuest = field(default_factory=FakeGuest)

    @property
    def state(self) -> str:
        return self.held or ("Off" if self.off else "Running")

    def add_disk(self, name: str, size: int, *, controller: str = "SCSI", location: int | None = None) -> FakeDisk:
        path = f"C:\\VMs\\{self.guid[:4]}\\{name}.vhdx"
        here = self.host.here(path)
        here.parent.mkdir(parents=True, exist_ok=True)
        create_disk(here, size=size, block_size=1 << 20)
        at = len(self.disks) if location is None else location
        controller_id = _IDE if controller == "IDE" else str(uuid.uuid4()).upper()
        if controller == "SCSI" and self.disks:
            controller_id = self.disks[0].controller_id
        disk = FakeDisk(self.host, controller, 0, at, size, [path], bytearray(size), controller_id)
        self.disks.append(disk)
        return disk

    # -- what WMI's methods do

    def create_snapshot(self, type_: str = RECOVERY) -> Snapshot:
        self.host.now += 1
        guid = str(uuid.uuid4())
        tracked = []
        for disk in self.disks:
            identifier = f"rctX:{uuid.uuid4().hex[:8]}:{uuid.uuid4()}:00000001"
            if type_ == RECOVERY:
                disk.tracked[identifier] = self.host.now
            tracked.append(identifier)
        made = Snapshot(guid, type_, self.host.now, [disk.files[-1] for disk in self.disks], tracked)
        for disk in self.disks:
            disk.freeze(type_)
        self.snapshots.append(made)
        return made

    def destroy_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshots.remove(snapshot)
        for number, (disk, frozen) in enumerate(zip(self.disks, snapshot.frozen, strict=True)):
            above = disk.files[disk.files.index(frozen) + 1]
            disk.merge(disk.files.index(frozen))
            for other in self.snapshots:
                if other.frozen[number] == above:
                    other.frozen[number] = frozen
        self._forget_unused()

    def convert(self, snapshot: Snapshot) -> ReferencePoint:
        if snapshot.type != RECOVERY:
            raise HostFaultError("Refused", 32773)
        identifiers = [disk.identifier(self.guid, "L") for disk in self.disks]
        made = ReferencePoint(f"Microsoft:{str(uuid.uuid4()).upper()}", 2, identifiers, list(snapshot.tracked))
        self.references.append(made)
        self.destroy_snapshot(snapshot)
        return made

    def destroy_reference(self, reference: ReferencePoint) -> None:
        self.references.remove(reference)
        self._forget_unused()

    def _forget_unused(self) -> None:
        kept: list[Snapshot | ReferencePoint] = [*self.snapshots, *self.references]
        used = {one for each in kept for one in self._tracked_of(each)}
        for disk in self.disks:
            disk.tracked = {one: at for one, at in disk.tracked.items() if one in used}

    @staticmethod
    def _tracked_of(one: Snapshot | ReferencePoint) -> list[str]:
        return one.tracked if isinstance(one, Snapshot) else one.changes

    def lose_tracking(self) -> None:
        """As after the record of changes was found damaged: no identifier is known any more."""
        for disk in self.disks:
            disk.tracked.clear()

    def recovery_checkpoints(self) -> list[str]:
        return [one.id for one in self.snapshots if one.type == RECOVERY]


@dataclass
class FakeHost:
    """A host. ``before`` and ``after`` are called around each script; what they raise happens there."""

    folder: Path
    vms: list[FakeVm] = field(default_factory=list)
    ledgers: dict[str, str] = field(default_factory=dict)
    quirks: set[str] = field(default_factory=set)
    faults: dict[str, list[HostFaultError]] = field(default_factory=dict)  # by script, in the order they are to happen
    dies_in: str = ""  # the host ends in that script, its deed done and not written down
    most_processed: int = 1 << 62
    now: int = 0
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    urls: list[str | None] = field(default_factory=list)
    switches: list[Any] = field(default_factory=list)
    is_2016: bool = False  # Windows Server 2016, whose Set-VM knows of no automatic checkpoints
    memory: int = 64 << 30
    busy: int = 0  # times that files are in use when they are to be removed
    done: list[str] = field(default_factory=list)  # cmdlets that changed something
    dies_at: int = 0  # the host ends before the cmdlet that would be the so-manieth of those
    before: Callable[[str, int], None] = lambda name, number: None
    after: Callable[[str, int], None] = lambda name, number: None

    def here(self, path: str) -> Path:
        """Where a file of the host really is."""
        return self.folder.joinpath(*path.replace(":", "").split("\\"))

    def add_vm(self, name: str, **about: Any) -> FakeVm:
        vm = FakeVm(self, str(uuid.uuid4()), name, **about)
        self.vms.append(vm)
        return vm

    def connect(self, url: str | None) -> FakeSession:
        self.urls.append(url)
        return FakeSession(self)

    def vm(self, guid: str) -> FakeVm:
        for one in self.vms:
            if one.guid == guid:
                return one
        raise HostFaultError("NotFound", message="Der virtuelle Computer wurde nicht gefunden.")

    def line(self, ledger: str, *fields: str) -> None:
        assert re.fullmatch("[0-9a-f]{32}", ledger), ledger
        self.ledgers[ledger] = self.ledgers.get(ledger, "") + "\t".join(fields) + "\n"

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


class FakeSession:
    """A session with the host. One in which the agent was killed, or the host ended, answers nothing any more."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._dead: BaseException | None = None
        self.closed = False

    def run(self, script: str, parameters: Mapping[str, str], *, timeout_seconds: float) -> str:
        assert not self.closed, "the session was closed"
        assert timeout_seconds > 0
        if self._dead is not None:
            raise self._dead
        known = next((one for one in (*scripts.ALL, *recovery.ALL) if one.text == script), None)
        assert known is not None, "a script that was put together"
        declared = _DECLARED.findall(script.partition("\n")[0])
        assert set(declared) == set(parameters), "PowerShell wants all parameters, and knows no others"
        assert all(type(value) is str for value in parameters.values())
        self._host.asked.append((known.name, dict(parameters)))
        number = len(self._host.asked)
        try:
            self._host.before(known.name, number)
            answer = self._answer(known, dict(parameters))
            self._host.after(known.name, number)
        except (Killed, SessionError) as end:
            self._dead = end
            raise
        return self._printed(answer)

    def close(self) -> None:
        self.closed = True

    def _answer(self, script: scripts.Script, given: dict[str, str]) -> dict[str, Any]:
        from tests.support import fake_hyperv_cmdlets as cmdlets  # noqa: PLC0415 - they know this module

        try:
            waiting = self._host.faults.get(script.name)
            if waiting:
                raise waiting.pop(0)
            return cmdlets.executed(self._host, script.text, given)
        except HostFaultError as fault:
            return {"fault": {"kind": fault.kind, "code": fault.code, "message": fault.message}, "godwit": 1}

    def _printed(self, answer: dict[str, Any]) -> str:
        quirks = self._host.quirks
        text = json.dumps(_misshapen(answer, quirks), ensure_ascii=False, separators=(",", ":"))
        if "bom" in quirks:
            text = "\ufeff" + text
        return text + "\r\n" if "lines" in quirks else text


def _snake(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _misshapen(value: Any, quirks: set[str]) -> Any:
    """Do to JSON what PowerShell 5.1 does on some paths."""
    if isinstance(value, dict):
        return {key: _misshapen(one, quirks) for key, one in value.items()}
    if isinstance(value, list):
        values = [_misshapen(one, quirks) for one in value]
        if "single" in quirks and len(values) == 1:
            return values[0]
        if "null" in quirks and not values:
            return None
        return {"value": values, "Count": len(values)} if "wrapped" in quirks else values
    return value
