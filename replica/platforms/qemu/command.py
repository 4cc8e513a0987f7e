"""The command line by which QEMU becomes a recovery machine."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from replica.errors import PlatformError
from replica.platforms.overlay import backing_node
from replica.platforms.platform import DiskSpec, MachineSpec
from replica.platforms.qemu.files import QemuFiles

PROGRAM: Final = "qemu-system-x86_64"
# Code and variables belong together; the second pair is where older releases keep them, the third is Fedora's.
FIRMWARE: Final = (
    (Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")),
    (Path("/usr/share/OVMF/OVMF_CODE.fd"), Path("/usr/share/OVMF/OVMF_VARS.fd")),
    (Path("/usr/share/edk2/ovmf/OVMF_CODE.fd"), Path("/usr/share/edk2/ovmf/OVMF_VARS.fd")),
)
IDE_DISKS: Final = 4  # of a Generation 1 machine, two on each channel
SATA_DISKS: Final = 6  # of one controller
MIB: Final = 1 << 20
_MACHINES: Final = uuid.UUID("5c0a3a35-0a5e-4a8f-8f57-0c6f1b8f6f10")  # names below it give machines their UUIDs


def command_line(
    spec: MachineSpec, files: QemuFiles, backed: frozenset[int], *, accelerator: str, options: Sequence[str] = ()
) -> list[str]:
    """Return the command. ``backed`` are the numbers of the disks that are not hydrated yet. Raises PlatformError."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise PlatformError(f"{PROGRAM} is needed and not installed", hint="install qemu-system-x86")
    machine = "q35" if spec.machine.generation == 2 else "pc"
    command = [
        *(program, "-name", f"guest={_escaped(spec.name)}", "-machine", f"{machine},accel={accelerator}"),
        *(
            "-cpu",
            "max",
            "-smp",
            str(max(1, spec.machine.cpus)),
            "-m",
            f"size={max(1, spec.machine.memory_bytes // MIB)}M",
        ),
        *("-uuid", str(bios_uuid(spec.name))),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "std"),
        *("-daemonize", "-pidfile", str(files.process.pid_file)),
        *_socket("monitor", files.monitor),
        *("-mon", "chardev=monitor,mode=control"),
        *_socket("replication", files.replication),
        *("-mon", "chardev=replication,mode=control"),
        *("-chardev", f"file,id=console,path={_escaped(str(files.console))},append=on", "-serial", "chardev:console"),
        *_socket("agent", files.agent),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-device", "virtio-rng-pci"),
    ]
    if spec.machine.generation == 2:
        code, _ = firmware()
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={_escaped(str(code))}"]
        command += ["-drive", f"if=pflash,unit=1,format=raw,file={_escaped(str(files.variables))}"]
    for disk in spec.disks:
        command += ["-blockdev", json.dumps(block_node(disk, files, backed=disk.number in backed))]
        if disk.number in backed:
            # A BIOS reads sector by sector: what was fetched once, by whole clusters, is kept.
            keeping = {"driver": "copy-on-read", "node-name": _keeper(disk.number), "file": node_name(disk.number)}
            command += ["-blockdev", json.dumps(keeping)]
    command += [argument for line in _devices(spec, backed) for argument in ("-device", line)]
    return [*command, *_adapters(spec), *options]


def block_node(disk: DiskSpec, files: QemuFiles, *, backed: bool) -> dict[str, Any]:
    """Return the block node of a disk. What lies below is part of it, and goes with the last use of it."""
    node: dict[str, Any] = {
        "driver": "qcow2",
        "node-name": node_name(disk.number),
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(files.disk(disk.number)), "discard": "unmap"},
        "backing": backing_node(disk) if backed else None,
    }
    return node


def node_name(number: int) -> str:
    """Return the name of the block node that the guest's disk stands on."""
    return f"disk{number}"


def _keeper(number: int) -> str:
    return f"keep{number}"


def bios_uuid(name: str) -> uuid.UUID:
    """Return the UUID that the machine's firmware tells its guest: the same at every start."""
    return uuid.uuid5(_MACHINES, name)


def mac_of(spec: MachineSpec, number: int) -> str:
    """Return the address of an adapter: the one that it is to have, else one of its own, the same at every start."""
    given = spec.machine.nics[number].mac
    if given:
        return given
    made = uuid.uuid5(bios_uuid(spec.name), f"adapter {number}").bytes
    return ":".join(f"{one:02x}" for one in (0x52, 0x54, 0x00, *made[:3]))


def firmware() -> tuple[Path, Path]:
    """Return the files of a UEFI machine: code, and variables that nothing has used. Raises PlatformError."""
    for code, variables in FIRMWARE:
        if code.exists() and variables.exists():
            return code, variables
    raise PlatformError(
        "a machine of Generation 2 needs OVMF, and it is not installed", hint="install ovmf, or say --generation 1"
    )


def _devices(spec: MachineSpec, backed: frozenset[int]) -> Iterator[str]:
    """Yield the devices of the disks. An error of a disk stops the machine: once it is cured, it goes on."""
    common = "rerror=stop,werror=stop"
    first = min((disk.number for disk in spec.disks), default=0)
    plain = 0
    for disk in spec.disks:
        node = _keeper(disk.number) if disk.number in backed else node_name(disk.number)
        what = f"drive={node},id=device{disk.number},{common}"
        what += ",bootindex=1" if disk.number == first else ""
        if disk.bus == "virtio" or disk.sector_size != 512:  # no IDE disk has other sectors
            size = disk.sector_size
            yield f"virtio-blk-pci,{what},logical_block_size={size},physical_block_size={max(size, 4096)}"
            continue
        if spec.machine.generation == 1 and plain < IDE_DISKS:
            yield f"ide-hd,{what},bus=ide.{plain // 2},unit={plain % 2}"
        elif spec.machine.generation == 2 and plain < SATA_DISKS:
            yield f"ide-hd,{what},bus=ide.{plain}"
        else:
            controller, port = divmod(plain - (IDE_DISKS if spec.machine.generation == 1 else SATA_DISKS), SATA_DISKS)
            if port == 0:
                yield f"ich9-ahci,id=sata{controller}"
            yield f"ide-hd,{what},bus=sata{controller}.{port}"
        plain += 1


def _adapters(spec: MachineSpec) -> list[str]:
    """Return the adapters. Each reaches out through the host, as a program of it; nothing reaches in."""
    # Kernels made for clouds have no driver for adapters that were ever sold, Windows none for those that were not.
    paravirtual = spec.system == "linux" or any(disk.bus == "virtio" for disk in spec.disks)
    model = "virtio-net-pci" if paravirtual else "e1000e" if spec.machine.generation == 2 else "e1000"
    arguments = ["-nic", "none"] if not spec.machine.nics else []
    for number in range(len(spec.machine.nics)):
        restricted = ",restrict=on" if spec.isolated else ""
        arguments += ["-netdev", f"user,id=net{number}{restricted}"]
        arguments += ["-device", f"{model},netdev=net{number},mac={mac_of(spec, number)}"]
    return arguments


def _socket(name: str, path: Path) -> list[str]:
    return ["-chardev", f"socket,id={name},path={_escaped(str(path))},server=on,wait=off"]


def _escaped(value: str) -> str:
    return value.replace(",", ",,")
