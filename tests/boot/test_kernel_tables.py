"""What a Linux kernel makes of converted tables, and of restored ones: Debian's, with nothing of Debian around it.

Kernels that tests run under need not know any partition table; the guests' does. Its own initial RAM disk is started
with another first program, which tells what partitions each disk has.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from conversion.gpt_copies import mended, read_copies
from conversion.layout import Layout
from conversion.layout_planner import plan_layout
from conversion.reconcile import reconcile, restore
from tests.property.test_partition_tables import CORE, gpt_disks, no_guid, windows_like
from tests.support import debian_guest, qemu
from tests.support.gpt_disks import SparseDisk, convert

pytestmark = [pytest.mark.boot, pytest.mark.xdist_group("machines")]

MOST_DISKS = 24  # of one machine's PCI slots
TIMEOUT_SECONDS = 600
FIRST_PROGRAM = """\
#!/bin/sh
mkdir -p /proc /sys
mount -t proc none /proc
mount -t sysfs none /sys
modprobe virtio_pci
modprobe virtio_blk
tries=0
while [ "$(ls -d /sys/class/block/vd? 2>/dev/null | wc -l)" -lt @DISKS@ ] && [ $tries -lt 600 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
for disk in /sys/class/block/vd?; do
    for part in "$disk"/vd*; do
        [ -e "$part/partition" ] || continue
        echo "GODWIT-TABLE $(cat "$disk/serial") $(cat "$part/partition") $(cat "$part/start") $(cat "$part/size") end"
    done
done > /run-out
while read -r line; do printf '\\n%s\\n' "$line" > /dev/console; done < /run-out
printf '\\nGODWIT-DONE\\n' > /dev/console
poweroff -f
"""
Found = dict[int, tuple[int, int]]  # by number: first sector and length


def test_the_kernel_finds_what_was_planned_and_what_was_restored(tmp_path: Path) -> None:
    missing = debian_guest.missing_tools() + qemu.missing_programs()
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make setup` installs what is needed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    images: dict[str, Path] = {}
    expected: dict[str, Found] = {}
    extended: dict[str, tuple[int, int]] = {}
    for number, (disk, layout, before) in enumerate(converted_disks()):
        name = f"converted-{number}"
        images[name] = disk.to_file(tmp_path / name)
        expected[name] = {one.number: (one.first_lba, one.sectors) for one in layout.entries}
        if layout.extended is not None:
            extended[name] = (layout.extended.number, layout.extended.first_lba)
        name = f"restored-{number}"
        images[name] = before.to_file(tmp_path / name)
        copies = read_copies(before)
        assert copies is not None
        expected[name] = {one.number: (one.first_lba, one.sectors) for one in copies.table.partitions}
    assert len(images) == MOST_DISKS
    assert len(extended) >= 4
    told = asked(images, tmp_path)
    for name, found in told.items():
        if name in extended:
            number, start = extended[name]
            assert found.pop(number, (0, 0))[0] == start, name  # of its length the kernel shows a loader's room
        assert found == expected[name], name
    assert told.keys() == expected.keys()


def converted_disks() -> list[tuple[SparseDisk, Layout, SparseDisk]]:
    """Return converted disks, how they were laid out, and what they became when they were restored."""
    drawn = [windows_like(count) for count in (4, 6, 7, 8, 9, 12)]

    @settings(
        max_examples=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(gpt_disks())
    def draw(one: tuple[SparseDisk, int]) -> None:
        drawn.append(one)

    draw()
    made: list[tuple[SparseDisk, Layout, SparseDisk]] = []
    for disk, boot in drawn:
        copies = read_copies(disk)
        assert copies is not None
        if copies.table.header.entry_size != 128:  # Linux knows no other
            continue
        for offset, data in mended(copies):
            disk.write_at(offset, data)
        planned = plan_layout(
            copies.table,
            sectors=copies.sectors,
            sector_size=512,
            system="windows",
            boot_partition=boot,
            core_sectors=13,
        )
        if planned.layout is None:
            continue
        layout, saved = convert(disk, boot=boot, system="windows", core=CORE)
        back = disk.copy()
        restore(back, reconcile(back, saved, new_guid=no_guid))
        made.append((disk, layout, back))
        if len(made) == MOST_DISKS // 2:
            break
    return made


def asked(images: dict[str, Path], folder: Path) -> dict[str, Found]:
    """Start the kernel with the disks, and return what it says of each."""
    version = debian_guest.kernel_version()
    kernel, initial = folder / "kernel", folder / "initial"
    kernel.write_bytes(debian_guest.system_file(f"boot/vmlinuz-{version}"))
    program = FIRST_PROGRAM.replace("@DISKS@", str(len(images))).encode()
    ram_disk = debian_guest.system_file(f"boot/initrd.img-{version}")
    initial.write_bytes(ram_disk + bytes(-len(ram_disk) % 4) + archive("init", program))
    console = folder / "console"
    command = [qemu.QEMU, "-machine", "q35,accel=tcg", "-m", "512", "-smp", "1", "-nodefaults", "-display", "none"]
    command += ["-no-reboot", "-kernel", str(kernel), "-initrd", str(initial), "-serial", f"file:{console}"]
    command += ["-append", "console=ttyS0,115200 quiet panic=-1"]
    for number, (name, image) in enumerate(images.items()):
        command += ["-drive", f"if=none,id=d{number},format=raw,read-only=on,file={image}"]
        command += ["-device", f"virtio-blk-pci,drive=d{number},serial={name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        said = f"QEMU ended with {done.returncode}: {done.stderr}"
    except subprocess.TimeoutExpired:
        said = f"the machine did not end within {TIMEOUT_SECONDS} s"
    lines = console.read_text(errors="replace").replace("\r", "").splitlines() if console.exists() else []
    tail = "\n".join([said, "--- console", *lines[-30:]])
    assert "GODWIT-DONE" in lines, tail
    told: dict[str, Found] = {name: {} for name in images}
    for line in lines:
        words = line.split()
        if words[:1] == ["GODWIT-TABLE"]:
            assert len(words) == 6 and words[5] == "end", tail
            told[words[1]][int(words[2])] = (int(words[3]), int(words[4]))
    return told


def archive(name: str, content: bytes) -> bytes:
    """Return a cpio archive, of the form that the kernel unpacks, with one program; it comes after another one."""

    def entry(number: int, name: str, mode: int, content: bytes) -> bytes:
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % one for one in fields) + name.encode() + b"\0"
        return header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4)

    return entry(1, name, 0o100755, content) + entry(0, "TRAILER!!!", 0, b"")
