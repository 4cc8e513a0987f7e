"""The server behind a machine that was started before anything was restored: it serves the point's disks by NBD.

It is a process of its own, ``python -m replica.platforms.servant FOLDER``, at home in the machine's folder: its
configuration is there, its log, and the socket it listens on. It outlives the command that started it, and ends when
it is told to, when the machine's own disks are whole, or when the machine was deleted. After a crash or a reboot it is
started anew by whoever starts the machine. Secrets come by its environment and are in none of its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from conversion.errors import ConversionError
from conversion.manifest import Manifest
from replica import catalog, configuration, keysource
from replica.configuration import Configuration
from replica.errors import GodwitError, PlatformError
from replica.generation.patched import Conversion
from replica.host import Host, this_host
from replica.nbd.connection import connect_unix
from replica.nbd.wire import NbdGoneError, UnixAddress
from replica.platforms.folder import MachineFolder
from replica.platforms.overlay import is_hydrated, stands_alone
from replica.platforms.process import Owned, start
from replica.platforms.sockets import make_place, socket_path
from replica.serving import serve_point
from replica.stores.address import open_store
from replica.stores.store import Store
from replica.vault import Vault
from vhdx.errors import DiskBusyError, DiskError
from vhdx.osfile import open_file

MODULE: Final = ("-m", "replica.platforms.servant")
CONFIGURATION: Final = "servant.json"
LOG: Final = "servant.log"
SOCKET: Final = "nbd"
PID: Final = "servant.pid"
LOCK: Final = "servant.lock"
MANIFEST: Final = "conversion"
LARGEST_CONFIGURATION_BYTES: Final = 1 << 16
MOST_REMARKS: Final = 10_000  # in one log
START_SECONDS: Final = 120.0
END_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 2.0
POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class ServantSpec:
    """What is to be served, and for which ``overlays``: files in the folder that, once whole, need no server."""

    store: str  # its address
    tenant: str
    vm: str  # its name
    point: int
    generation: Literal[1, 2]
    overlays: tuple[str, ...]
    state_folder: str | None = None
    configuration: str | None = None  # the configuration file of the command that started it
    converted_disk: int | None = None  # the disk that the conversion manifest in the folder is of


def url(folder: Path, disk: int) -> str:
    """Return the address at which the machine in ``folder`` has that disk of its point."""
    return f"nbd+unix:///{disk}?socket={quote(str(socket_path(folder, SOCKET)))}"


def prepare(folder: MachineFolder, spec: ServantSpec, conversion: Conversion | None = None) -> None:
    """Write what the server is to know, and the conversion that lies over the disks. Raises PlatformError.

    Without ``conversion`` the server plans it by itself where ``spec.generation`` asks for one. One that serves
    something else is ended.
    """
    folder.make()
    files = {}
    if conversion is not None and conversion.manifest is not None:
        files[MANIFEST] = conversion.manifest.encode()
        spec = replace(spec, converted_disk=conversion.disk)
    files[CONFIGURATION] = json.dumps(asdict(spec), indent=1).encode()
    with folder.errors("look at what was served before"):
        paths = {folder.path / name: content for name, content in files.items()}
        if all(path.exists() and path.read_bytes() == content for path, content in paths.items()):
            return
    end(folder.path)
    for name, content in files.items():
        folder.write_file(name, content)


def ensure(folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
    """Return once the server of the machine in ``folder`` listens, started unless it runs; nothing without one.

    ``environment`` is the one that it gets: ours unless given. Raises PlatformError with what it said.
    """
    if not (folder / CONFIGURATION).exists():
        return
    deadline = time.monotonic() + START_SECONDS
    if _process(folder).pid() is not None and _listens(folder, deadline):
        return
    log = folder / LOG
    before = log.stat().st_size if log.exists() else 0
    given = {"OPENBLAS_NUM_THREADS": "1", **(os.environ if environment is None else environment)}
    command = [sys.executable, *MODULE, str(folder)]
    child = start(command, log=log, environment=given, folder=Path.cwd())
    while not _answers(folder):
        if child.poll() is not None and _process(folder).pid() is None:  # or another one serves
            said = _said(log, before)
            raise PlatformError(
                f"the server of the machine's disks does not start: {said}",
                path=str(log),
                hint="it takes the tenant's key and the store's credentials from the environment",
            )
        if time.monotonic() > deadline:
            raise PlatformError("the server of the machine's disks does not come up", path=str(log))
        time.sleep(POLL_SECONDS)


def is_running(folder: Path) -> bool:
    """Whether the machine's disks are being served."""
    return _process(folder).pid() is not None


def end(folder: Path) -> None:
    """End the server, if it runs. Raises PlatformError where it does not end."""
    _process(folder).end(timeout_seconds=END_SECONDS)


def _process(folder: Path) -> Owned:
    return Owned(folder / PID, (*MODULE, str(folder)))


def _listens(folder: Path, deadline: float) -> bool:
    """Wait for a server that is being started; False where it ended."""
    while not _answers(folder):
        if not is_running(folder):
            return False
        if time.monotonic() > deadline:
            raise PlatformError("the server of the machine's disks does not answer", path=str(folder / LOG))
        time.sleep(POLL_SECONDS)
    return True


def _answers(folder: Path) -> bool:
    try:
        connect_unix(str(socket_path(folder, SOCKET)), 1.0).close()
    except OSError:
        return False
    return True


def _said(log: Path, start_bytes: int) -> str:
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(start_bytes)
        lines = file.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "it gave no reason"


# -- the process itself -----------------------------------------------------------------------------------------------


def read_spec(folder: Path) -> ServantSpec:
    """Return what is to be served. Raises PlatformError."""
    path = folder / CONFIGURATION
    try:
        with path.open("rb") as file:
            document: dict[str, Any] = json.loads(file.read(LARGEST_CONFIGURATION_BYTES))
        spec = ServantSpec(**{**document, "overlays": tuple(document["overlays"])})
    except OSError as error:
        raise PlatformError(f"cannot read the configuration: {error.strerror}", path=str(path)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlatformError(f"the configuration cannot be read: {error}", path=str(path)) from error
    if spec.generation not in (1, 2) or not isinstance(spec.point, int):
        raise PlatformError("the configuration contradicts itself", path=str(path))
    return spec


def serve(folder: Path, ended: threading.Event) -> None:
    """Serve until ``ended`` is set, the overlays are whole, or the machine is gone. Raises GodwitError and others."""
    spec = read_spec(folder)
    store, loaded = opened_store(spec, os.environ)
    host = this_host(None if spec.state_folder is None else Path(spec.state_folder))
    remarks = _Remarks()
    found = catalog.find(store, spec.tenant, spec.vm)
    make_place(folder)
    socket_path(folder, SOCKET).unlink(missing_ok=True)  # of one that was killed: ours is the lock
    with serve_point(
        store,
        host,
        found,
        UnixAddress(str(socket_path(folder, SOCKET))),
        point=spec.point,
        generation=spec.generation,
        conversion=conversion_of(folder, spec),
        workers=loaded.workers,
        report=lambda error: None if isinstance(error, (NbdGoneError, ConnectionError)) else remarks.add(str(error)),
    ) as serving:
        remarks.add(f"serving point {serving.point} of {serving.vm} as Generation {serving.generation}")
        while not ended.wait(LOOK_SECONDS):
            if not (folder / CONFIGURATION).exists():
                remarks.add("the machine was deleted")
                return
            if _are_whole(folder, spec.overlays, host, loaded):
                remarks.add("the machine's disks are whole, and need no server any more")
                return


def opened_store(spec: ServantSpec, environment: Mapping[str, str]) -> tuple[Store, Configuration]:
    """Return the store that the disks are in, opened by the key of ``environment``. Raises GodwitError."""
    file = None if spec.configuration is None else Path(spec.configuration)
    loaded = configuration.load(environment=environment, file=file, store=spec.store, tenant=spec.tenant)
    vault = Vault(
        lambda: keysource.given_secret(loaded, environment, lambda _: None), require=loaded.require_encryption
    )
    threads = loaded.workers.threads + loaded.workers.uploads
    return open_store(spec.store, workers=threads, around=vault.around), loaded


def conversion_of(folder: Path, spec: ServantSpec) -> Conversion | None:
    """Return the conversion that was written down for the disks in ``folder``, if any. Raises PlatformError."""
    if spec.converted_disk is None:
        return None
    path = folder / MANIFEST
    try:
        return Conversion(spec.converted_disk, Manifest.decode(path.read_bytes(), name=str(path)))
    except OSError as error:
        raise PlatformError(f"cannot read the conversion manifest: {error.strerror}", path=str(path)) from error


def _are_whole(folder: Path, overlays: tuple[str, ...], host: Host, loaded: Configuration) -> bool:
    """Whether the machine's disks need nothing of ours any more, whatever becomes of its QEMU."""
    try:
        if not overlays or not all(stands_alone(folder / name) for name in overlays):
            return False
        if not all(is_hydrated(folder / name) for name in overlays):
            _have_settled(folder, host, loaded)
        return all(is_hydrated(folder / name) for name in overlays)
    except GodwitError:  # a disk is not there yet, or the machine does not answer now: at the next look
        return False


def _have_settled(folder: Path, host: Host, loaded: Configuration) -> None:
    """Have the platform look at the machine's disks, by which it settles them. Raises GodwitError."""
    from replica.platforms.registry import open_platform  # noqa: PLC0415 - the platforms start us

    platform = open_platform(folder.parent.name, host, tables=loaded.platforms)
    platform.disks(MachineFolder(folder, folder.name).read().name)


class _Remarks:
    """What goes into the log, at most so many: a store that is away is told of with each block."""

    def __init__(self) -> None:
        self._left = MOST_REMARKS
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        with self._lock:
            self._left -= 1
            if self._left >= 0:
                _say(text)


def _say(text: str) -> None:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    sys.stderr.write(f"{stamp} {text}\n")
    sys.stderr.flush()


def main(folder: Path) -> int:
    """Run the server of the machine in ``folder``; return the exit code."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        (folder / LOCK).touch(mode=0o600)
        lock = open_file(folder / LOCK, writable=True)
    except DiskBusyError:
        _say("another process serves already")
        return 0
    except (OSError, DiskError) as error:
        _say(f"cannot lock: {error}")
        return 1
    try:
        (folder / PID).write_text(f"{os.getpid()}\n")
        serve(folder, ended)
    except (GodwitError, ConversionError, DiskError) as error:
        _say(str(error) + (f" ({error.hint})" if error.hint else ""))
        return getattr(error, "exit_code", 1)
    except OSError as error:
        _say(f"{error.strerror or error}: {error.filename}")
        return 1
    finally:
        with contextlib.suppress(OSError):
            (folder / PID).unlink(missing_ok=True)
        lock.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
