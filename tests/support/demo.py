"""Tells Godwit's story on a real virtual machine: built, protected, changed, replicated, restored, booted.

Everything is done through the command line, and every command is shown, so that the reader can repeat it by hand.
Run by ``make demo``; all it makes is below .demo/, but for the built guest, which is kept for the next time.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.support import debian_guest, qemu

FOLDER = Path(".demo")
MIB = 1 << 20
WRITTEN_MIB = 20
GUEST_WRITES = (
    f"head -c {WRITTEN_MIB * MIB} /dev/urandom > /var/lib/godwit/data && sha256sum < /var/lib/godwit/data"
    " && echo written by the guest >> /var/lib/godwit/journal"
)
GUEST_READS = "sha256sum < /var/lib/godwit/data"
STEPS = 8


class DemoError(RuntimeError):
    """A step did not do what it should; the message says what happened."""


@dataclass(slots=True)
class Terminal:
    """What the demo says, in colour where a person watches."""

    lively: bool = field(default_factory=sys.stdout.isatty)
    coloured: bool = field(default_factory=lambda: sys.stdout.isatty() and "NO_COLOR" not in os.environ)

    def style(self, code: str, text: str) -> str:
        """Return ``text`` in an ANSI style, or as it is."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured else text

    def title(self, text: str) -> None:
        """Open the story."""
        print(f"\n{self.style('1', text)}", flush=True)

    def step(self, number: int, text: str) -> None:
        """Open a step."""
        print(f"\n{self.style('1;36', f'{number}/{STEPS}')}  {self.style('1', text)}", flush=True)

    def command(self, text: str) -> None:
        """Show a command as one would type it."""
        print(f"     {self.style('33', '$ ' + text)}", flush=True)

    def output(self, text: str, *, code: str = "0") -> None:
        """Show what a command printed."""
        for line in text.rstrip().splitlines():
            print(f"     {self.style(code, line)}")
        sys.stdout.flush()

    def said(self, text: str) -> None:
        """Tell how it went."""
        print(f"     {self.style('32', '✓')} {text}", flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say what is being waited for, and take it back once it is over, where the terminal can."""
        print(f"     {self.style('2', text + ' …')}", end="" if self.lively else "\n", flush=True)
        try:
            yield
        finally:
            if self.lively:
                print("\r\x1b[2K", end="", flush=True)


@dataclass(slots=True)
class Demo:
    """The story's state: where things are, and what was measured on the way."""

    terminal: Terminal = field(default_factory=Terminal)
    seconds: dict[str, float] = field(default_factory=dict)
    points: list[dict[str, Any]] = field(default_factory=list)
    stored_bytes: list[int] = field(default_factory=list)
    written: tuple[str, ...] = ()

    guest_raw: Path = FOLDER / "debian.raw"
    source: Path = FOLDER / "vm1.vhdx"
    store: Path = FOLDER / "store"

    @property
    def store_url(self) -> str:
        """The store's address."""
        return self.store.resolve().as_uri()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note how long something took."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def run(self, *command: str, note: str | None = None) -> None:
        """Show a command, run it and show what it prints.

        ``note`` names the time it takes, where that is worth telling; such a command draws a progress bar, which goes
        straight to the terminal.
        """
        self.terminal.command(" ".join(command))
        program = [*_program(command[0]), *command[1:]]
        draws_bar = command[0] == "godwit" and note is not None and sys.stderr.isatty()
        if command[0] == "godwit" and note is not None and not draws_bar:
            program.append("--quiet")
        started = time.monotonic()
        done = subprocess.run(
            program,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=None if draws_bar else subprocess.PIPE,
            text=True,
            check=False,
        )
        self.terminal.output(done.stdout)
        self.terminal.output(done.stderr or "", code="2")
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(command)}` ended with status {done.returncode}")
        if note is not None:
            self.seconds[note] = time.monotonic() - started

    def ask(self, *command: str) -> Any:
        """Run a godwit command quietly and return the JSON it prints."""
        program = [*_program(command[0]), *command[1:], "--json"]
        done = subprocess.run(program, env=self._environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DemoError(f"`{' '.join(command)}` ended with status {done.returncode}\n{done.stderr}")
        return json.loads(done.stdout)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "GODWIT_STORE": self.store_url}


def _program(name: str) -> list[str]:
    beside = Path(sys.executable).with_name(name)
    return [str(beside) if beside.exists() else name]


def build(demo: Demo) -> None:
    """Make the source: a Debian VM's disk as a dynamic VHDX."""
    terminal = demo.terminal
    terminal.step(1, "Build a virtual machine: Debian 12, Generation 2 (GPT, UEFI), on a VHDX")
    with demo.timed("build the VM"), terminal.waiting("mmdebstrap is installing Debian (about 40 s, once)"):
        kept = debian_guest.cached_guest()
    demo.guest_raw.symlink_to(kept)
    how = "kept from before" if demo.seconds["build the VM"] < 1 else _seconds(demo.seconds["build the VM"])
    terminal.said(f"{demo.guest_raw}: {_size(debian_guest.SIZE_BYTES)}, {how}")
    demo.run("godwit", "disk", "convert", str(demo.guest_raw), str(demo.source), note="convert raw to VHDX")
    demo.run("godwit", "disk", "check", str(demo.source), note="check the VHDX")


def protect(demo: Demo) -> None:
    """Open a store and put the VM under protection."""
    demo.terminal.step(2, "Open a store in a folder (S3 works the same) and protect the VM")
    demo.terminal.command(f"export GODWIT_STORE={demo.store_url}")
    demo.run("godwit", "init", demo.store_url)
    demo.run("godwit", "protect", "vm1", "--disk", str(demo.source))


def replicate_first(demo: Demo) -> None:
    """Initial replication."""
    demo.terminal.step(3, "Replicate: the first recovery point takes everything that is allocated")
    demo.run("godwit", "replicate", "vm1", note="first replication")
    demo.stored_bytes.append(_tree_bytes(demo.store))
    demo.terminal.said(
        f"{_size(debian_guest.SIZE_BYTES)} of disk, {_size(demo.source.stat().st_size)} as a VHDX, "
        f"{_size(demo.stored_bytes[0])} in the store, {_seconds(demo.seconds['first replication'])}"
    )


def live(demo: Demo) -> None:
    """Let the guest do some work of its own."""
    demo.terminal.step(4, f"Let the VM live: it boots under UEFI and writes {WRITTEN_MIB} MiB of its own")
    booted = _boot(demo, demo.source, GUEST_WRITES, "the VM runs and works")
    demo.written = booted.output
    demo.terminal.output(booted.ready)
    demo.terminal.said(f"it wrote {WRITTEN_MIB} MiB, SHA-256 {demo.written[0][:16]}…, and shut itself down")


def replicate_again(demo: Demo) -> None:
    """Delta replication."""
    demo.terminal.step(5, "Replicate again: only what changed travels")
    demo.run("godwit", "replicate", "vm1", note="second replication")
    demo.stored_bytes.append(_tree_bytes(demo.store))
    added = demo.stored_bytes[1] - demo.stored_bytes[0]
    demo.terminal.said(
        f"{_size(added)} more in the store, for {WRITTEN_MIB} MiB of random data and Debian's own writes, "
        f"{_seconds(demo.seconds['second replication'])}"
    )


def look(demo: Demo) -> None:
    """List the points and check the store against its hashes."""
    demo.terminal.step(6, "Two recovery points; read everything back from the store and check it")
    demo.run("godwit", "points", "vm1")
    demo.points = demo.ask("godwit", "points", "vm1")["points"]
    if len(demo.points) != 2:
        raise DemoError(f"expected two recovery points, found {len(demo.points)}")
    demo.run("godwit", "verify", "vm1", "--full", note="verify")


def restore(demo: Demo) -> None:
    """Restore both points, judged by qemu-img."""
    demo.terminal.step(7, "Restore both points; qemu-img, which knows nothing of Godwit, compares")
    first, last = str(min(_number(point) for point in demo.points)), FOLDER / "restored.vhdx"
    before = FOLDER / "before.vhdx"
    demo.run("godwit", "restore", "vm1", "--to", str(last), note="restore the latest point")
    demo.run("godwit", "restore", "vm1", "--to", str(before), "--point", first, note="restore the first point")
    demo.run("qemu-img", "compare", "-f", "vhdx", "-F", "vhdx", str(demo.source), str(last))
    demo.run("qemu-img", "compare", "-f", "raw", "-F", "vhdx", str(demo.guest_raw), str(before))
    demo.terminal.said("byte for byte: the latest is the VM's disk now, the first the disk before it ran")


def boot(demo: Demo) -> None:
    """Boot what was restored."""
    demo.terminal.step(8, "Boot the restored disk on a machine with untouched UEFI variables")
    booted = _boot(demo, FOLDER / "restored.vhdx", GUEST_READS, "the restored VM boots")
    demo.terminal.output(booted.ready)
    if booted.output != demo.written or "last=written by the guest" not in booted.ready:
        raise DemoError(f"the restored guest does not hold what the source wrote: {booted.output} {demo.written}")
    demo.terminal.said(f"its file has SHA-256 {booted.output[0][:16]}…: what the VM wrote came back with it")


def tell(demo: Demo, total_seconds: float) -> None:
    """Sum up, and say what to try next."""
    terminal = demo.terminal
    terminal.title("What happened")
    file_bytes, (first, both) = demo.source.stat().st_size, demo.stored_bytes
    rows = [
        ("the disk", f"{_size(debian_guest.SIZE_BYTES)} virtual, {_size(file_bytes)} as a VHDX file"),
        ("the first point", f"{_size(first)} in the store"),
        ("the second point", f"{_size(both - first)} more"),
        *((name, _seconds(seconds)) for name, seconds in demo.seconds.items()),
        ("all of it", _seconds(total_seconds)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"     {name:<{width}}  {value}")
    terminal.title("What to try next")
    suggestions = (
        ("export PATH=$PWD/.venv/bin:$PATH GODWIT_STORE=" + demo.store_url, ""),
        ("godwit points vm1 --json", "every command speaks JSON"),
        ("godwit restore vm1 --to .demo/vm1.qcow2 --format qcow2", "another format"),
        ("godwit disk info .demo/vm1.vhdx", "the disk tool, useful by itself"),
        ("python -m tests.support.qemu .demo/restored.vhdx", f"log in as root, password {debian_guest.PASSWORD}"),
    )
    for command, why in suggestions:
        print(f"     {terminal.style('33', command)}{terminal.style('2', '  # ' + why) if why else ''}")
    print(
        f"\n     All of this is in {FOLDER}/, which `make clean` removes. The built VM, kept for the next time, is in"
    )
    print(f"     {debian_guest.cache_dir()}.")


def _boot(demo: Demo, disk: Path, commands: str, why: str) -> qemu.Boot:
    demo.terminal.command(f"python -m tests.support.qemu {disk}")
    with demo.timed(why), demo.terminal.waiting("starting under emulation (about 25 s)"):
        booted = qemu.boot(disk, commands=commands)
    if booted.status != 0:
        raise DemoError(f"the guest's commands failed:\n{booted.console[-2000:]}")
    return booted


def _number(point: dict[str, Any]) -> int:
    number = point["point"]
    assert isinstance(number, int)
    return number


def _tree_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or unit == "bytes" else f"{value:.1f} {unit}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


CHAPTERS: tuple[Callable[[Demo], None], ...] = (
    build,
    protect,
    replicate_first,
    live,
    replicate_again,
    look,
    restore,
    boot,
)


def _ended(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Tell the whole story; return the exit code."""
    signal.signal(signal.SIGTERM, _ended)  # so that a running machine is ended with the demo
    missing = debian_guest.missing_tools() + qemu.missing_programs()
    if missing:
        print(f"Not installed: {', '.join(missing)}. `make setup` installs what is needed.", file=sys.stderr)
        return 1
    started = time.monotonic()
    demo = Demo()
    demo.terminal.title("Godwit: a virtual machine is replicated, changes, and comes back")
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    try:
        for chapter in CHAPTERS:
            chapter(demo)
    except (DemoError, debian_guest.GuestBuildError, qemu.BootError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe demo was interrupted; `make demo` starts it anew.", file=sys.stderr)
        return 130
    tell(demo, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
