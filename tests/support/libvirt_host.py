"""A libvirt daemon of our own, and domains without a guest: what a guest would write is written by QEMU's monitor."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from replica.libvirt.address import LibvirtAddress

PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "qemu-nbd")
NOBODY = 65534  # root's libvirt would be the system's: ours runs as a user, as whose daemon it is nobody else's
WAIT_SECONDS = 60


def missing() -> list[str]:
    """What is not installed. Debian keeps libvirtd where only root looks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


class LibvirtHost:
    """A daemon with all that it keeps in a folder of its own. ``scratch`` is one that its QEMU can write to."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gwl", dir="/tmp"))  # short: sockets lie deep within
        self._user = NOBODY if os.geteuid() == 0 else None
        self.scratch = self.folder / "scratch"
        self.images = self.folder / "images"
        names = {"RUNTIME_DIR": "r", "CONFIG_HOME": "c", "CACHE_HOME": "k", "DATA_HOME": "d", "STATE_HOME": "s"}
        folders = {f"XDG_{name}": self.folder / short for name, short in names.items()}
        for made in (self.scratch, self.images, *folders.values()):
            made.mkdir()
        for made in (self.folder, *self.folder.iterdir()):
            if self._user is not None:
                os.chown(made, NOBODY, NOBODY)
        self.folder.chmod(0o755)
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self._environment = {"PATH": path, "HOME": str(self.folder), **{k: str(v) for k, v in folders.items()}}
        self.connect = f"qemu+unix:///session?socket={self.folder}/r/libvirt/libvirt-sock"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: str) -> None:
        """Run a program as the daemon's user."""
        subprocess.run(command, check=True, env=self._environment, user=self._user, group=self._user)

    def virsh(self, *arguments: str) -> str:
        """Do something as the administrator."""
        command = ["virsh", "--quiet", "--connect", self.connect, *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def start(self) -> None:
        """Start the daemon, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["libvirtd"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
            )
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            done = subprocess.run(["virsh", "--connect", self.connect, "list"], capture_output=True, check=False)
            if done.returncode == 0:
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((self.folder / "log").read_text() + done.stderr.decode())
            time.sleep(0.05)

    def stop(self, *, kill: bool = False) -> None:
        """End the daemon. What it runs goes on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
            self._process.wait()
            self._process = None

    def restart(self, *, kill: bool = False) -> None:
        """End the daemon and start it again."""
        self.stop(kill=kill)
        self.start()

    def pid_of(self, name: str) -> int | None:
        """Return the process of a domain that runs."""
        try:
            return int((self.folder / "r/libvirt/qemu/run" / f"{name}.pid").read_text())
        except OSError:
            return None

    def __enter__(self) -> LibvirtHost:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        for file in self.folder.glob("r/libvirt/qemu/run/*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except (OSError, ValueError):
                continue
        shutil.rmtree(self.folder, ignore_errors=True)


class RunningDomain:
    """A domain whose processor never starts, with disks ``vda``, ``vdb``…, and what they should hold."""

    def __init__(
        self, host: LibvirtHost, name: str, formats: tuple[str, ...], size: int, *, agent: bool = False
    ) -> None:
        self.host = host
        self.name = name
        self.formats = formats
        self.targets = [f"vd{'abcdefgh'[number]}" for number in range(len(formats))]
        self.files = [host.images / f"{name}-{number}.{one}" for number, one in enumerate(formats)]
        for file, one in zip(self.files, formats, strict=True):
            host.run("qemu-img", "create", "-q", "-f", one.partition("-")[0], *_options(one), str(file), str(size))
        self.model = [bytearray(size) for _ in formats]
        self.define(agent=agent)

    def addresses(self, *, freeze: bool = True) -> list[str]:
        """Return the disks as they are protected."""
        return [str(LibvirtAddress(self.name, target, self.host.connect, freeze)) for target in self.targets]

    def define(self, *, agent: bool = False, extra: str = "") -> None:
        """Define the domain, or define it anew."""
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{one.partition('-')[0]}' discard='unmap'/>"
            f"<source file='{file}'/><target dev='{target}' bus='virtio'/></disk>"
            for one, file, target in zip(self.formats, self.files, self.targets, strict=True)
        )
        channel = "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        xml = (
            f"<domain type='qemu'><name>{self.name}</name><uuid>{self.uuid}</uuid><memory unit='MiB'>32</memory>"
            "<vcpu>3</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><devices>"
            f"{disks}{extra}{channel if agent else ''}<controller type='usb' model='none'/><memballoon model='none'/>"
            "</devices></domain>"
        )
        path = self.host.folder / f"{self.name}.xml"
        path.write_text(xml)
        self.host.virsh("define", str(path))

    @property
    def uuid(self) -> str:
        """The domain's UUID, made of its name."""
        return f"00000000-0000-4000-8000-{int.from_bytes(self.name.encode()[-6:], 'big'):012x}"

    def start(self) -> None:
        """Start the machine, its processor left standing."""
        self.host.virsh("start", self.name, "--paused")

    def stop(self) -> None:
        """End the machine in order."""
        self.host.virsh("destroy", self.name, "--graceful")

    def kill_soon(self) -> None:
        """End the machine as a crash of QEMU does, if it runs; libvirt finds out."""
        pid = self.host.pid_of(self.name)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the machine as a crash of QEMU does, and wait until libvirt knows."""
        self.kill_soon()
        deadline = time.monotonic() + WAIT_SECONDS
        while self.host.virsh("domstate", self.name).strip() != "shut off":
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def write(self, number: int, offset: int, length: int, value: int) -> None:
        """Write as the guest would, and in the model."""
        self._io(number, f"write -q -P {value} {offset} {length}")
        self.model[number][offset : offset + length] = bytes([value]) * length

    def discard(self, number: int, offset: int, length: int) -> None:
        """Make a range zeros as the guest would, and in the model."""
        self._io(number, f"write -q -z -u {offset} {length}")
        self.model[number][offset : offset + length] = bytes(length)

    def flush(self, number: int) -> None:
        """Make what was written outlast a crash of QEMU, as a guest that syncs does."""
        self._io(number, "flush")

    def _io(self, number: int, command: str) -> None:
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        said = self.host.virsh("qemu-monitor-command", self.name, "--hmp", f'qemu-io -d {device} "{command}"')
        assert not re.search(r"error|failed|conflict", said, re.IGNORECASE), said

    def monitor(self, command: str) -> str:
        """Run a QMP command, given as JSON, behind libvirt's back."""
        return self.host.virsh("qemu-monitor-command", self.name, command)

    def state(self) -> tuple[bytes, ...]:
        """Return what the disks hold now."""
        return tuple(bytes(one) for one in self.model)

    def checkpoints(self) -> list[str]:
        """Return the names of all checkpoints."""
        return self.host.virsh("checkpoint-list", self.name, "--name").split()

    def bitmaps(self) -> set[str]:
        """Return the names of all bitmaps of the running machine's disks."""
        rows = self.monitor('{"execute": "query-named-block-nodes", "arguments": {"flat": true}}')
        return set(re.findall(r'"name":"(godwit[^"]*)"', rows))

    def job(self) -> str | None:
        """Return the backup job that runs."""
        command = ["virsh", "--connect", self.host.connect, "backup-dumpxml", self.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None


def _options(image_format: str) -> list[str]:
    """Return the options of a format such as ``qcow2-old``, which cannot keep bitmaps."""
    return ["-o", "compat=0.10"] if image_format.endswith("-old") else []
