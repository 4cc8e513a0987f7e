"""What a platform keeps about a machine: a folder below the state folder, with the machine's description in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from replica.errors import PlatformError
from replica.host import Host
from replica.model import Machine, Nic
from replica.platforms.platform import DiskSpec, MachineSpec, PlatformName
from replica.platforms.sockets import remove_place
from vhdx.errors import DiskError
from vhdx.osfile import OS_FILES, fsync_folder
from vhdx.temporary import temporary_path

DESCRIPTION: Final = "machine.json"
LONGEST_NAME: Final = 100
LARGEST_DESCRIPTION_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class MachineFolder:
    """The folder of one machine. The machine is defined while its description is there; the rest is what it uses."""

    path: Path
    name: str

    @property
    def description(self) -> Path:
        """The file that makes the machine exist."""
        return self.path / DESCRIPTION

    def make(self) -> None:
        """Make the folder, for its owner alone. Raises PlatformError."""
        with self.errors("make the folder"):
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def is_defined(self) -> bool:
        """Whether the machine is there."""
        return self.description.exists()

    def read(self) -> MachineSpec:
        """Return what the machine was defined as. Raises PlatformError."""
        with self.errors("read the machine's description"):
            try:
                with self.description.open("rb") as file:
                    data = file.read(LARGEST_DESCRIPTION_BYTES)
            except FileNotFoundError:
                raise PlatformError(
                    f"there is no machine {self.name!r} here", hint="is this the host that it was started on?"
                ) from None
        try:
            return _decoded(json.loads(data))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PlatformError(
                f"the machine's description cannot be read: {error}",
                path=str(self.description),
                hint="delete the machine, and start it anew from its recovery point",
            ) from error

    def write(self, spec: MachineSpec) -> None:
        """Write the description, durably: the machine exists from then on. Raises PlatformError."""
        self.write_file(DESCRIPTION, json.dumps(_encoded(spec), indent=1).encode())

    def write_file(self, name: str, content: bytes) -> None:
        """Put a file in place whole or not at all, for its owner alone. Raises PlatformError."""
        path = self.path / name
        finished = temporary_path(path)
        with self.errors(f"write {name}"):
            try:
                file = OS_FILES.open(finished, create=True)
                try:
                    finished.chmod(0o600)
                    file.pwrite(0, content)
                    file.fsync()
                finally:
                    file.close()
                OS_FILES.replace(finished, path)
            except BaseException:
                OS_FILES.remove(finished)
                raise

    def remove(self) -> None:
        """Remove the folder and all that is in it; the description goes first. Raises PlatformError."""
        with self.errors("remove the machine's files"):
            self.description.unlink(missing_ok=True)
            if self.path.exists():
                fsync_folder(self.path)
                shutil.rmtree(self.path)
            remove_place(self.path)
        if self.path.exists():
            raise PlatformError("the machine's folder is still there", path=str(self.path))

    @contextmanager
    def errors(self, operation: str) -> Iterator[None]:
        """Tell what goes wrong with the files as this machine's trouble."""
        try:
            yield
        except (OSError, DiskError) as error:
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            hint = getattr(error, "hint", None)
            raise PlatformError(f"{self.name}: cannot {operation}: {reason}", path=str(self.path), hint=hint) from error


@dataclass(frozen=True, slots=True)
class MachineFolders:
    """The folders of all machines of a platform on this host."""

    host: Host
    platform: PlatformName

    @property
    def root(self) -> Path:
        """Where they are. Raises PlatformError where this host keeps no state."""
        if self.host.state_folder is None:
            raise PlatformError(
                "recovery machines need a state folder, and there is none",
                hint="set GODWIT_STATE to a folder that can be written to",
            )
        return self.host.state_folder / "machines" / self.platform

    def of(self, name: str) -> MachineFolder:
        """Return the folder of the machine of that name, made or not. Raises PlatformError for what is no name."""
        if not name or len(name) > LONGEST_NAME:
            raise PlatformError(f"a machine's name has 1 to {LONGEST_NAME} characters", hint="choose another name")
        file_name = quote(name, safe=" ")
        return MachineFolder(self.root / (f"%2E{file_name[1:]}" if file_name.startswith(".") else file_name), name)

    def names(self) -> list[str]:
        """Return the names of all machines that are defined."""
        try:
            found = sorted(one.parent.name for one in self.root.glob(f"*/{DESCRIPTION}"))
        except OSError as error:
            raise PlatformError(f"cannot list the machines: {error.strerror}", path=str(self.root)) from error
        return [unquote(one) for one in found]

    @contextmanager
    def held(self, name: str) -> Iterator[MachineFolder]:
        """Give the machine's folder, held against other commands of this host. Raises LeaseHeldError."""
        folder = self.of(name)
        with self.host.exclusive(f"machine-{self.platform}-{folder.path.name}"):
            yield folder


def _encoded(spec: MachineSpec) -> dict[str, Any]:
    document = asdict(spec)
    for disk in document["disks"]:
        disk["path"] = None if disk["path"] is None else str(disk["path"])
    return document


def _decoded(document: dict[str, Any]) -> MachineSpec:
    machine = dict(document["machine"])
    machine["nics"] = tuple(Nic(**one) for one in machine["nics"])
    disks = tuple(DiskSpec(**{**one, "path": one["path"] and Path(one["path"])}) for one in document["disks"])
    networks = tuple(document.get("networks", ()))
    return MachineSpec(**{**document, "machine": Machine(**machine), "disks": disks, "networks": networks})
