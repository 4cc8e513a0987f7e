"""Starts virtual machines under QEMU: headless, emulated, watched through their serial console, ended by process id.

QEMU opens the disk image itself (VHDX included), so what boots is what Godwit wrote. The firmware is OVMF for a
Generation 2 machine, with variables that no boot has touched, or SeaBIOS for a Generation 1 machine.

Run as a program it starts a machine to log in to, on this terminal: ``python -m tests.support.qemu DISK.vhdx``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Firmware = Literal["ovmf", "seabios"]
Bus = Literal["virtio", "ide"]  # ide: as a Generation 1 machine of Hyper-V offers its disk

QEMU = "qemu-system-x86_64"
READY = "GODWIT-READY"
DONE = "GODWIT-DONE"
# An emulated guest is up in 20 seconds on a quiet machine, and was seen to take 100 on one that was busy with others.
PATIENCE_SECONDS = 600.0
TAIL_LINES = 60
OUT = "GODWIT-OUT "
# Code and variables belong together; the second pair is where releases before Debian 12 kept them.
OVMF_PAIRS = (
    (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")),
    (Path("/usr/share/OVMF/OVMF_CODE.fd"), Path("/usr/share/OVMF/OVMF_VARS.fd")),
)


class BootError(RuntimeError):
    """A machine did not start, say what was waited for, or stop; the message ends with the console's last lines."""


@dataclass(frozen=True, slots=True)
class Boot:
    """What a machine that has run and powered itself off left behind."""

    ready: str  # the line by which the guest told that it was up
    output: tuple[str, ...]  # what the commands printed
    status: int  # of the commands
    ready_seconds: float  # from starting QEMU to the ready line
    total_seconds: float  # from starting QEMU to its end
    console: str


@dataclass(frozen=True, slots=True)
class _Setup:
    disk: Path
    firmware: Firmware
    image_format: str
    commands: str | None
    keep_disk: bool
    accelerator: str
    memory_mib: int
    bus: Bus


class Machine:
    """A running machine; use as a context manager, so that it never outlives its caller."""

    def __init__(
        self,
        disk: Path,
        *,
        firmware: Firmware = "ovmf",
        image_format: str = "vhdx",
        commands: str | None = None,
        keep_disk: bool = False,
        accelerator: str | None = None,
        memory_mib: int = 512,
        bus: Bus = "virtio",
    ) -> None:
        """Describe a machine on ``disk``.

        ``commands`` is a line of shell that a guest of ``tests.support.debian_guest`` runs once it is up, and powers
        off after. With ``keep_disk`` nothing the guest writes reaches the file. The accelerator is
        GODWIT_QEMU_ACCEL's unless given, and without that emulation, which every machine can do.
        """
        accelerator = accelerator or os.environ.get("GODWIT_QEMU_ACCEL", "tcg")
        self._setup = _Setup(disk, firmware, image_format, commands, keep_disk, accelerator, memory_mib, bus)
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0

    def __enter__(self) -> Machine:
        self._folder = Path(tempfile.mkdtemp(prefix="godwit-qemu-"))
        try:
            console = f"file,id=console,path={self._folder / 'console'}"
            command = _command(self._setup, self._folder, ["-chardev", console, "-serial", "chardev:console"])
            self._started = time.monotonic()
            with (self._folder / "qemu.log").open("wb") as log:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def console(self) -> str:
        """Everything the serial console has printed so far."""
        assert self._folder is not None
        path = self._folder / "console"
        return path.read_bytes().decode("utf-8", "replace").replace("\r", "") if path.exists() else ""

    @property
    def seconds(self) -> float:
        """The time since QEMU was started."""
        return time.monotonic() - self._started

    def wait_for(self, text: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> str:
        """Return the console's first whole line that has ``text``, from there on. Raises BootError.

        What the kernel says may stand before it: it does not wait for others to end their lines.
        """
        assert self._process is not None
        while True:
            ended = self._process.poll() is not None
            for line in self.console.split("\n")[:-1]:
                if text in line:
                    return line[line.index(text) :]
            if ended:
                raise BootError(f"the machine ended before it said {text!r}\n{self._tail()}")
            if self.seconds > timeout_seconds:
                raise BootError(f"the machine did not say {text!r} within {timeout_seconds:.0f} s\n{self._tail()}")
            time.sleep(0.1)

    def wait_off(self, *, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Return once the machine has powered itself off. Raises BootError."""
        assert self._process is not None
        try:
            status = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise BootError(f"the machine did not power off within {timeout_seconds:.0f} s\n{self._tail()}") from None
        if status != 0:
            raise BootError(f"QEMU ended with status {status}\n{self._tail()}")

    def kill(self) -> None:
        """Pull the plug: what the guest had not flushed is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def run_here(self) -> int:
        """Run the machine with its serial console on this terminal until it is powered off; return QEMU's status."""
        with tempfile.TemporaryDirectory(prefix="godwit-qemu-") as name:
            command = _command(self._setup, Path(name), ["-serial", "mon:stdio"])
            return subprocess.run(command, check=False).returncode

    def _tail(self) -> str:
        assert self._folder is not None
        log = (self._folder / "qemu.log").read_text(errors="replace")
        console = self.console.splitlines()
        load = "unknown" if sys.platform == "win32" else " ".join(f"{one:.1f}" for one in os.getloadavg())
        state = f"after {self.seconds:.0f} s, the machine's load being {load}, {len(console)} lines on the console"
        return "\n".join([state, *log.splitlines()[-5:], "--- console", *console[-TAIL_LINES:]])


def boot(
    disk: Path,
    *,
    firmware: Firmware = "ovmf",
    image_format: str = "vhdx",
    commands: str = "true",
    keep_disk: bool = False,
    timeout_seconds: float = PATIENCE_SECONDS,
    bus: Bus = "virtio",
) -> Boot:
    """Start a guest of ``tests.support.debian_guest``, let it run ``commands`` and power off.

    Raises BootError where it does not come up, does not end, or QEMU complains; the status of the commands is the
    caller's to judge.
    """
    machine = Machine(
        disk, firmware=firmware, image_format=image_format, commands=commands, keep_disk=keep_disk, bus=bus
    )
    with machine:
        ready = machine.wait_for(READY, timeout_seconds=timeout_seconds)
        ready_seconds = machine.seconds
        done = machine.wait_for(DONE, timeout_seconds=timeout_seconds)
        machine.wait_off()
        console = machine.console
        return Boot(
            ready=ready,
            output=tuple(line.partition(OUT)[2] for line in console.split("\n") if OUT in line),
            status=int(done.rpartition("=")[2]),
            ready_seconds=ready_seconds,
            total_seconds=machine.seconds,
            console=console,
        )


def missing_programs() -> list[str]:
    """What booting needs and is not installed."""
    missing = [program for program in (QEMU, "qemu-img") if shutil.which(program) is None]
    return missing if any(code.exists() for code, _ in OVMF_PAIRS) else [*missing, "OVMF"]


def _command(setup: _Setup, folder: Path, console: list[str]) -> list[str]:
    """The QEMU command line; ``folder`` takes the machine's own copy of the firmware's variables."""
    # The host does not crash while a test runs: what the guest flushes need not reach the host's disk at once.
    drive = f"if=none,id=disk,format={setup.image_format},file={_escaped(str(setup.disk))},cache=unsafe,discard=unmap"
    machine = "q35" if setup.firmware == "ovmf" else "pc"
    command = [
        *(QEMU, "-machine", f"{machine},accel={setup.accelerator}", "-m", str(setup.memory_mib), "-smp", "1"),
        *("-nodefaults", "-display", "none", "-vga", "none", "-no-reboot", "-nic", "none", *console),
        *("-drive", drive + (",snapshot=on" if setup.keep_disk else "")),
        *("-device", f"{'virtio-blk-pci' if setup.bus == 'virtio' else 'ide-hd'},drive=disk,bootindex=1"),
        *("-device", "virtio-rng-pci"),
    ]
    if setup.firmware == "ovmf":
        code, variables = _ovmf()
        shutil.copyfile(variables, folder / "variables.fd")
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"]
        command += ["-drive", f"if=pflash,unit=1,format=raw,file={folder / 'variables.fd'}"]
    if setup.commands is not None:
        command += ["-smbios", f"type=1,serial={_escaped(f'godwit:{setup.commands} #poweroff')}"]
    return command


def _ovmf() -> tuple[Path, Path]:
    for code, variables in OVMF_PAIRS:
        if code.exists() and variables.exists():
            return code, variables
    raise BootError("no OVMF firmware is installed; `make setup` installs it")


def _escaped(value: str) -> str:
    return value.replace(",", ",,")


def main() -> int:
    """Start a machine on the disk that the first argument names, with its console here."""
    disk = Path(sys.argv[1])
    print("Log in as root, password godwit; `poweroff` ends the machine, Ctrl-A X pulls its plug.", flush=True)
    return Machine(disk, image_format=disk.suffix.removeprefix(".")).run_here()


if __name__ == "__main__":
    sys.exit(main())
