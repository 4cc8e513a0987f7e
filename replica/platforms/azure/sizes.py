"""Sizes of machines on Azure, and the limits of disks there: what can be said before anything is uploaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from replica.errors import PlatformError
from replica.model import Machine
from replica.platforms.platform import MachineSpec
from vhdx.vhd_create import aligned_size

GIB: Final = 1 << 30
LARGEST_DISK_BYTES: Final = 4095 * GIB
LARGEST_BIOS_DISK_BYTES: Final = 2048 * GIB  # an MBR addresses no more


@dataclass(frozen=True, slots=True)
class Size:
    """A size: processors, memory, and the most data disks and adapters."""

    name: str
    cpus: int
    memory_bytes: int
    data_disks: int
    nics: int


def _size(name: str, cpus: int, memory_gib: int, data_disks: int, nics: int) -> Size:
    return Size(name, cpus, memory_gib * GIB, data_disks, nics)


# Series that take machines of both generations, and premium disks; cheapest first where several would do.
SIZES: Final = (
    _size("Standard_D2s_v5", 2, 8, 4, 2),
    _size("Standard_E2s_v5", 2, 16, 4, 2),
    _size("Standard_D4s_v5", 4, 16, 8, 2),
    _size("Standard_E4s_v5", 4, 32, 8, 2),
    _size("Standard_D8s_v5", 8, 32, 16, 4),
    _size("Standard_E8s_v5", 8, 64, 16, 4),
    _size("Standard_D16s_v5", 16, 64, 32, 8),
    _size("Standard_E16s_v5", 16, 128, 32, 8),
    _size("Standard_E20s_v5", 20, 160, 32, 8),
    _size("Standard_D32s_v5", 32, 128, 32, 8),
    _size("Standard_E32s_v5", 32, 256, 32, 8),
    _size("Standard_D48s_v5", 48, 192, 32, 8),
    _size("Standard_E48s_v5", 48, 384, 32, 8),
    _size("Standard_D64s_v5", 64, 256, 32, 8),
    _size("Standard_E64s_v5", 64, 512, 32, 8),
    _size("Standard_D96s_v5", 96, 384, 32, 8),
    _size("Standard_E96s_v5", 96, 672, 32, 8),
)


def size_for(machine: Machine, data_disks: int, wanted: str | None = None) -> str:
    """Return the size for a machine: the ``wanted``, else the least that has all it needs. Raises PlatformError."""
    nics = max(1, len(machine.nics))
    known = next((one for one in SIZES if one.name == wanted), None)
    if wanted is not None and known is None:
        return wanted  # Azure knows more sizes than are listed here, and will say what does not suit
    if known is not None:
        for what, most, has in (("data disks", known.data_disks, data_disks), ("adapters", known.nics, nics)):
            if has > most:
                raise PlatformError(f"the machine has {has} {what}, and {wanted} takes {most}", hint=_HINT)
        return known.name
    for one in SIZES:
        enough = one.cpus >= machine.cpus and one.memory_bytes >= machine.memory_bytes
        if enough and one.data_disks >= data_disks and one.nics >= nics:
            return one.name
    raise PlatformError(
        f"no size is known that has {machine.cpus} processors, {machine.memory_bytes >> 20} MiB of memory, "
        f"{data_disks} data disks and {nics} adapters",
        hint=_HINT,
    )


_HINT: Final = "set vm_size in [platforms.azure] to one that does"


def check_disks(spec: MachineSpec, system_disk: int | None = None) -> None:
    """Refuse disks that Azure does not take. Raises PlatformError naming each.

    ``system_disk`` is the number of the one that the machine starts from, None where that is not known yet.
    """
    if not spec.disks:
        raise PlatformError(f"{spec.vm_name} has no disks")
    if system_disk is None and len(spec.disks) == 1:
        system_disk = spec.disks[0].number
    mistakes: list[str] = []
    for disk in spec.disks:
        if disk.sector_size != 512:
            mistakes.append(f"disk {disk.number} has sectors of {disk.sector_size} bytes, and a VHD has 512")
        elif aligned_size(disk.size) > LARGEST_DISK_BYTES:
            mistakes.append(
                f"disk {disk.number} has {disk.size} bytes, and a page blob becomes a disk of 4095 GiB at most"
            )
        elif disk.number == system_disk and spec.machine.generation == 1 and disk.size > LARGEST_BIOS_DISK_BYTES:
            mistakes.append(
                f"disk {disk.number} has {disk.size} bytes, and a machine of Generation 1 starts from 2048 GiB at most"
            )
    if mistakes:
        raise PlatformError(
            f"Azure does not take the disks of {spec.vm_name}: {'; '.join(mistakes)}",
            hint="failover to qemu, libvirt or files takes them as they are",
        )
