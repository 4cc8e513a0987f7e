"""The platform ``azure``: disks uploaded as page blobs, a template beside them, and the machine where az may make it.

Never run against Azure itself: built to what its interfaces document, and tested against Azurite and a stand-in of az.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import uuid5

from conversion.errors import ConversionError
from conversion.inspection import inspect
from replica.errors import PlatformError
from replica.generation.image import as_device
from replica.host import Host
from replica.model import Identity
from replica.platforms import diskfile, servant
from replica.platforms.azure import upload as uploading
from replica.platforms.azure.az import Az
from replica.platforms.azure.settings import AzureSettings
from replica.platforms.azure.sizes import check_disks, size_for
from replica.platforms.azure.target import BlobState
from replica.platforms.azure.template import MachineTemplate, Template, TemplateDisk, template
from replica.platforms.azure.upload import Order
from replica.platforms.folder import MachineFolder, MachineFolders
from replica.platforms.platform import DiskSpec, DiskState, GuestChannel, MachineSpec, PlatformName, Power
from vhdx.disk import Disk
from vhdx.progress import Progress, silent

if TYPE_CHECKING:
    from replica.platforms.azure.storage import Blobs

GUIDE: Final = "START.txt"
ARM_TEMPLATE: Final = "azuredeploy.json"
BICEP_TEMPLATE: Final = "main.bicep"
PARAMETERS: Final = "azuredeploy.parameters.json"
SYSTEM: Final = "system.json"
MOST_LOOKED_AT: Final = 8  # disks, for a system
UNKNOWN_GROUP: Final = "RESOURCE-GROUP"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}[A-Za-z0-9]|[A-Za-z0-9]")
_DISK = re.compile(r"disk-(\d{1,4})\.vhd")


@dataclass(frozen=True, slots=True)
class _SystemDisk:
    """The disk that a machine starts from, and what is on it. ``is_seen``: somebody has looked."""

    number: int
    system: Literal["linux", "windows"] | None
    is_seen: bool = False


class AzurePlatform:
    """The platform ``azure``; see ``replica.platforms.platform.Platform`` for the contract.

    Without a resource group in its settings it starts nothing: ``hydrate`` uploads the disks, and the folder holds
    the template that makes a machine of them. With one, ``start`` uploads and deploys.
    """

    def __init__(
        self,
        host: Host,
        settings: AzureSettings,
        *,
        progress: Progress = silent,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Keep templates below the host's state folder. ``environment`` has the credentials: ours unless given."""
        self._host = host
        self._settings = settings
        self._folders = MachineFolders(host, "azure")
        self._progress = progress
        self._environment = os.environ if environment is None else environment
        group = settings.resource_group
        self._az = None if group is None else Az(group, self._environment)

    @property
    def name(self) -> PlatformName:
        """The platform's name."""
        return "azure"

    def folder(self, name: str) -> MachineFolder:
        """Return the machine's folder, defined or not."""
        return self._folders.of(name)

    def names(self) -> list[str]:
        """Return the names of all machines that are defined from this host."""
        return self._folders.names()

    def report_to(self, progress: Progress) -> None:
        """Tell from now on how far uploads are."""
        self._progress = progress

    def check(self) -> None:
        """Return if the container can be reached with the credentials, and az its group. Raises PlatformError."""
        with self._blobs() as blobs:
            blobs.check()
        if self._az is not None:
            self._az.check()

    def check_machine(self, spec: MachineSpec) -> None:
        """Return if Azure takes the machine's disks, and knows a size and a place for it. Raises PlatformError."""
        check_disks(spec)
        size_for(spec.machine, len(spec.disks) - 1, self._settings.vm_size)
        if self._az is not None and not spec.isolated and self._settings.subnet is None:
            raise PlatformError(
                "which subnet the machine is to be in was not said", hint="set subnet in [platforms.azure]"
            )

    def define(self, spec: MachineSpec) -> None:
        """Write the machine's template; nothing is uploaded yet. Raises PlatformError for what Azure does not take."""
        if not _NAME.fullmatch(spec.name):
            raise PlatformError(
                f"{spec.name!r} cannot be a machine's name on Azure", hint="letters, digits and hyphens, 64 at most"
            )
        self.check_machine(spec)
        with self._folders.held(spec.name) as folder:
            if folder.is_defined() and folder.read() == spec:
                self._write_template(folder, spec)  # the settings may be others by now
                return
            folder.make()
            with folder.errors("make the machine"):
                folder.description.unlink(missing_ok=True)
                (folder.path / SYSTEM).unlink(missing_ok=True)  # that of another machine
            self._write_template(folder, spec)
            folder.write(spec)

    def start(self, name: str) -> None:
        """Upload what is missing and have Azure make the machine, or turn it on. Raises PlatformError."""
        spec = self.folder(name).read()
        if self._az is None:
            raise PlatformError(
                "these are blobs and a template: no resource group was named in which a machine may be made",
                path=str(self.folder(name).path),
                hint=self.guide(spec),
            )
        power = self._az.power(name)
        if power is Power.RUNNING:
            return
        if power is Power.OFF:
            self._az.start(name)
            return
        self.hydrate(name)
        folder = self.folder(name)
        if self._system(folder, spec).system is None:
            raise PlatformError(
                f"whether {spec.vm_name} is a Linux or a Windows machine is not seen on its disks",
                hint='set system = "linux" or "windows" in [platforms.azure]',
            )
        self._write_template(folder, spec)
        self._az.deploy(name, folder.path / ARM_TEMPLATE, folder.path / PARAMETERS)

    def stop(self, name: str, *, force: bool = False, timeout_seconds: float = 120) -> None:
        """Shut the guest down, or pull the plug, and give the processors back. Raises PlatformError."""
        if self._az is None:
            raise PlatformError(
                "no resource group was named: what was started from the template is not known here",
                path=str(self.folder(name).path),
                hint=f"az vm deallocate --resource-group {UNKNOWN_GROUP} --name {name}",
            )
        if self._az.power(name) is Power.RUNNING:
            self._az.stop(name, force=force, timeout_seconds=timeout_seconds)

    def power(self, name: str) -> Power:
        """Return whether it runs; OFF also for what has not been made a machine yet, or not all been removed."""
        if self._az is not None:
            power = self._az.power(name)
            if power is not Power.GONE:
                return power
        if self.folder(name).is_defined():
            return Power.OFF
        if self._az is not None and self._az.resources(name):
            return Power.OFF
        with self._blobs() as blobs:
            return Power.OFF if blobs.list(_prefix(name)) else Power.GONE

    def disks(self, name: str) -> tuple[DiskState, ...]:
        """Return the blobs of the disks, those that are whole and those to come."""
        folder = self.folder(name)
        with self._blobs() as blobs:
            there = {one.name: one for one in blobs.list(_prefix(name))}
            if not folder.is_defined():
                return tuple(self._states_of_others(there))
            found = []
            for disk in folder.read().disks:
                blob_name = _blob_name(name, disk.number)
                left = uploading.remaining_bytes(there.get(blob_name), _content(folder, disk), disk.size)
                whole = uploading.is_whole(there.get(blob_name), _content(folder, disk), disk.size)
                found.append(DiskState(disk.number, self._url(blob_name), whole, left))
            return tuple(found)

    def hydrate(self, name: str) -> None:
        """Upload the disks that are not whole yet, and return once they are. Raises PlatformError, BlobHeldError."""
        with self._folders.held(name) as folder, self._blobs() as blobs:
            spec = folder.read()
            there = {one.name: one for one in blobs.list(_prefix(name))}
            missing = [
                disk
                for disk in spec.disks
                if not uploading.is_whole(there.get(_blob_name(name, disk.number)), _content(folder, disk), disk.size)
            ]
            if not self._system(folder, spec).is_seen:
                self._look_for_system(folder, spec)
            for disk in missing:
                with folder.errors(f"upload disk {disk.number}"), self._opened(folder, disk) as source:
                    self._upload(blobs, folder, disk, source)

    def channel(self, name: str) -> GuestChannel | None:
        """Return None: no way into the guests is known yet that needs no network."""
        return None

    def screenshot(self, name: str) -> bytes | None:
        """Return None: Azure keeps pictures for its portal (az vm boot-diagnostics get-boot-log-uris)."""
        return None

    def identity(self, name: str) -> Identity:
        """Return by what Azure knows the machine. Raises PlatformError."""
        told = {} if self._az is None else self._az.machine(name)
        return Identity("azure", str(told.get("id") or name), str(told.get("vmId") or ""))

    def delete(self, name: str) -> None:
        """Remove the machine with all that was made for it, its blobs and its folder."""
        if self._az is not None:
            self._az.remove(name)
        with self._folders.held(name) as folder:
            servant.end(folder.path)
            with self._blobs() as blobs:
                for one in blobs.list(_prefix(name)):
                    blobs.blob(one.name).delete()
                left = blobs.list(_prefix(name))
            if left:
                raise PlatformError(
                    f"{len(left)} blobs of {name} are still there: {', '.join(one.name for one in left)}",
                    path=self._settings.container.url,
                )
            folder.remove()

    def guide_path(self, name: str) -> Path:
        """Return where it is said how a machine is made of the blobs."""
        return self.folder(name).path / GUIDE

    def guide(self, spec: MachineSpec) -> str:
        """Return how a machine is made of the blobs."""
        folder = self.folder(spec.name).path
        group = self._settings.resource_group or UNKNOWN_GROUP
        known = self._template(self.folder(spec.name), spec)
        words = ["az", "deployment", "group", "create", "--resource-group", group, "--name", spec.name]
        words += ["--template-file", str(folder / ARM_TEMPLATE), "--parameters", f"@{folder / PARAMETERS}"]
        words += [f"{one}={one.upper()}" for one in known.missing]
        return shlex.join(words)

    # -- what is made ---------------------------------------------------------------------------------------------

    def _upload(self, blobs: Blobs, folder: MachineFolder, disk: DiskSpec, source: Disk) -> None:
        order = Order(
            content=_content(folder, disk),
            lease=str(uuid5(uploading.NAMES, f"{self._host.host_id}/{folder.name}/{disk.number}")),
            created=self._host.clock.now(),
            uploads=self._settings.uploads,
            verify=self._settings.verify,
        )
        blob = blobs.blob(_blob_name(folder.name, disk.number))
        uploading.upload(source, blob, order, progress=diskfile.told_of(disk.number, self._progress))

    def _opened(self, folder: MachineFolder, disk: DiskSpec) -> AbstractContextManager[Disk]:
        return diskfile.opened(folder, disk, self._environment)

    def _template(self, folder: MachineFolder, spec: MachineSpec) -> Template:
        settings = self._settings
        system = self._system(folder, spec)
        disks = sorted(spec.disks, key=lambda one: one.number != system.number)  # what it starts from goes first
        return template(
            MachineTemplate(
                name=spec.name,
                vm_name=spec.vm_name,
                generation=spec.machine.generation,
                size=size_for(spec.machine, len(spec.disks) - 1, settings.vm_size),
                account=settings.container.account,
                disks=tuple(TemplateDisk(one.number, self._url(_blob_name(spec.name, one.number))) for one in disks),
                nics=max(1, len(spec.machine.nics)),
                closed=spec.isolated,
                disk_sku=settings.disk_sku,
                system=system.system,
                location=settings.location,
                subnet=settings.test_subnet if spec.isolated else settings.subnet,
                storage_account_id=settings.storage_account_id,
            )
        )

    def _write_template(self, folder: MachineFolder, spec: MachineSpec) -> None:
        made = self._template(folder, spec)
        folder.write_file(ARM_TEMPLATE, made.arm().encode())
        folder.write_file(BICEP_TEMPLATE, made.bicep().encode())
        folder.write_file(PARAMETERS, made.parameter_file().encode())
        folder.write_file(GUIDE, f"{self.guide(spec)}\n".encode())

    def _system(self, folder: MachineFolder, spec: MachineSpec) -> _SystemDisk:
        """Return what the machine starts from, as far as it is known: until it was looked for, the first disk."""
        try:
            told: Any = json.loads((folder.path / SYSTEM).read_bytes())
            found = _SystemDisk(int(told["disk"]), told["system"], is_seen=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            found = _SystemDisk(spec.disks[0].number, None)
        known = spec.system or self._settings.system
        return found if known is None else replace(found, system=known)

    def _look_for_system(self, folder: MachineFolder, spec: MachineSpec) -> None:
        """Find the disk that the machine starts from, and write the template anew for it. Raises PlatformError."""
        found = _SystemDisk(spec.disks[0].number, None)
        converted = _converted_disk(folder)
        if converted is not None and spec.system is not None:
            found = _SystemDisk(converted, spec.system)
        else:
            for disk in spec.disks[:MOST_LOOKED_AT]:
                with folder.errors(f"look for a system on disk {disk.number}"), self._opened(folder, disk) as opened:
                    try:
                        system = inspect(as_device(opened)).system
                    except ConversionError:
                        continue  # whoever deploys it knows
                if system is not None:
                    found = _SystemDisk(disk.number, system)
                    break
        check_disks(spec, found.number)
        folder.write_file(SYSTEM, json.dumps({"disk": found.number, "system": found.system}).encode())
        self._write_template(folder, spec)

    def _states_of_others(self, there: Mapping[str, BlobState]) -> Iterator[DiskState]:
        """Tell of disks that another host made, by what is noted with them."""
        for name, state in sorted(there.items()):
            match = _DISK.fullmatch(name.partition("/")[2])
            if match is not None:
                whole = uploading.says_whole(state)
                yield DiskState(int(match[1]), self._url(name), whole, 0 if whole else state.size)

    def _url(self, blob_name: str) -> str:
        return f"{self._settings.container.url}/{blob_name}"

    @contextmanager
    def _blobs(self) -> Iterator[Blobs]:
        try:
            from replica.platforms.azure.storage import Blobs  # noqa: PLC0415 - an extra, which is not always there
        except ImportError as error:
            raise PlatformError(
                f"Azure's blobs are reached by azure-storage-blob, which is not installed: {error}",
                hint="pip install 'godwit-dr[azure]'",
            ) from error
        blobs = Blobs(self._settings.container, self._environment)
        try:
            yield blobs
        finally:
            blobs.close()


def _prefix(name: str) -> str:
    return f"{name}/"


def _blob_name(name: str, disk: int) -> str:
    return f"{_prefix(name)}disk-{disk}.vhd"


def _converted_disk(folder: MachineFolder) -> int | None:
    """Return the number of the disk that is converted on the way, if any is. Raises PlatformError."""
    if not (folder.path / servant.CONFIGURATION).exists():
        return None
    return servant.read_spec(folder.path).converted_disk


def _content(folder: MachineFolder, disk: DiskSpec) -> str:
    """Return what names the disk's content, the same from every host. Raises PlatformError."""
    told: list[Any] = [folder.name, disk.number, disk.size]
    if (folder.path / servant.CONFIGURATION).exists():
        served = servant.read_spec(folder.path)
        told += [served.tenant, served.vm, served.point, served.generation, served.converted_disk]
        if served.converted_disk is not None:
            with folder.errors("read the conversion manifest"):
                told.append(hashlib.sha256((folder.path / servant.MANIFEST).read_bytes()).hexdigest())
    elif disk.path is not None:
        with folder.errors(f"look at disk {disk.number}"):
            about = Path(disk.path).stat()
        told += [str(disk.path), about.st_size, about.st_mtime_ns]
    else:
        told.append(disk.url)
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
