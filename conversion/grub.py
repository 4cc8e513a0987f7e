"""The GRUB core: calls grub-mkimage, and fits what comes out to the place on a disk that it is to start from.

GRUB is a program apart from this one, under the GPL. It is called where it is installed, and none of it is in this
tree: the boot code and the core that end up on a disk are read or made on the machine that converts, at that moment.

A BIOS loads the first sector of the disk. Its boot code loads the core's first sector from an LBA written into it, and
that one loads the rest of the core, by a list of (LBA, sectors, segment) at its end. The core holds every module that
it may need and its configuration, because a guest that has only known UEFI has none for a BIOS on its disk.

Layouts: GRUB 2.06, grub-core/boot/i386/pc/boot.S and diskboot.S; the patches are those of grub-bios-setup. All fields
are little-endian.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from conversion.errors import ToolError

PLATFORM: Final = "i386-pc"
DIRECTORY: Final = Path("/usr/lib/grub") / PLATFORM
PROGRAMS: Final = ("grub-mkimage", "grub2-mkimage")  # Debian's name, and that of Red Hat and SUSE
# Where the configuration and the late modules are, for whoever writes a configuration.
MEMDISK: Final = "(memdisk)/grub"
SECTOR_BYTES: Final = 512
BOOT_CODE_BYTES: Final = 440  # what follows in that sector is the disk's: its signature and its partitions
LARGEST_CORE_BYTES: Final = 0x78000  # of a core that a BIOS can load below 640 KiB

_HINT: Final = "install the packages grub-common and grub-pc-bin (or grub2-tools and grub2-pc-modules)"
_TIMEOUT_SECONDS: Final = 120

_CORE_LBA_OFFSET: Final = 0x5C  # u64: where the boot code finds the core
_DRIVE_OFFSET: Final = 0x64  # the drive to load from, and the first instructions after it
_DRIVE_AND_CHECK: Final = b"\xff\xfa\xeb\x05"  # the drive that the BIOS names; cli; jump over the check of its number
# Without that jump the number is checked, which helps where a BIOS names none; grub-bios-setup does so for hard disks.
_DRIVE_AND_NO_JUMP: Final = b"\xff\xfa\x90\x90"
_BLOCK_LIST: Final = struct.Struct("<QHH")  # first LBA, sectors, segment to load to
assert _BLOCK_LIST.size == 12
_BLOCK_LIST_OFFSET: Final = SECTOR_BYTES - _BLOCK_LIST.size
_LOAD_SEGMENT: Final = 0x820
_SIGNATURE: Final = b"\x55\xaa"


def build_core(
    configuration: str,
    modules: Sequence[str],
    *,
    late_modules: Sequence[str] = (),
    directory: Path = DIRECTORY,
) -> bytes:
    """Return a core image with ``modules`` and what they need inside, which executes ``configuration`` first of all.

    ``late_modules`` are inside too, but not loaded: the configuration loads one by ``insmod
    (memdisk)/grub/NAME.mod``. Equal arguments and an equal GRUB give equal bytes. Raises ToolError where GRUB is not
    installed or fails, and where the core is too large for a BIOS.
    """
    program = _program()
    memdisk = _memdisk(configuration, {name: _read(directory / f"{name}.mod") for name in late_modules})
    try:
        with tempfile.TemporaryDirectory(prefix="godwit-grub-") as name:
            archive, image = Path(name) / "memdisk.tar", Path(name) / "core.img"
            archive.write_bytes(memdisk)
            # In this order: -m sets a prefix of its own, which -p then replaces.
            command = [program, "-O", PLATFORM, "-d", str(directory), "-m", str(archive), "-p", MEMDISK]
            command += ["-o", str(image), *dict.fromkeys(("memdisk", "tar", "normal", *modules))]
            _run(command)
            core = image.read_bytes()
    except OSError as error:
        raise ToolError(f"cannot be called: {error}", subject=program, hint=_HINT) from error
    if len(core) > LARGEST_CORE_BYTES:
        message = f"made a core of {len(core)} bytes, and a BIOS loads {LARGEST_CORE_BYTES} at most"
        raise ToolError(message, subject=program)
    _check_core(core, ToolError("made no core that starts from a disk", subject=program, hint=_HINT))
    return core


def boot_code(core_lba: int, *, directory: Path = DIRECTORY) -> bytes:
    """Return the 440 bytes that start a disk whose core begins at sector ``core_lba``.

    Raises ToolError where GRUB's own are not installed or are not those that are known here.
    """
    if not 1 <= core_lba < 1 << 63:
        raise ValueError(f"a core cannot begin at sector {core_lba}")
    path = directory / "boot.img"
    image = bytearray(_read(path))
    known = image[_DRIVE_OFFSET : _DRIVE_OFFSET + len(_DRIVE_AND_CHECK)] == _DRIVE_AND_CHECK
    if len(image) != SECTOR_BYTES or image[-2:] != _SIGNATURE or not known:
        raise ToolError("is not the boot code of GRUB 2 that is known here", subject=str(path), hint=_HINT)
    struct.pack_into("<Q", image, _CORE_LBA_OFFSET, core_lba)
    image[_DRIVE_OFFSET : _DRIVE_OFFSET + len(_DRIVE_AND_NO_JUMP)] = _DRIVE_AND_NO_JUMP
    return bytes(image[:BOOT_CODE_BYTES])


def place_core(core: bytes, lba: int) -> bytes:
    """Return ``core`` as it is to be written from sector ``lba`` on: in whole sectors, knowing where its rest is.

    Raises ToolError where it is not a core made by ``build_core``.
    """
    if not 1 <= lba < 1 << 32:
        raise ValueError(f"a core cannot begin at sector {lba}")
    _check_core(core, ToolError("is not a core image", subject="core", hint=_HINT))
    sectors = core_sectors(core)
    placed = bytearray(core.ljust(sectors * SECTOR_BYTES, b"\0"))
    _BLOCK_LIST.pack_into(placed, _BLOCK_LIST_OFFSET, lba + 1, sectors - 1, _LOAD_SEGMENT)
    return bytes(placed)


def core_sectors(core: bytes) -> int:
    """Return how many sectors of 512 bytes a core takes."""
    return -(-len(core) // SECTOR_BYTES)


def _check_core(core: bytes, error: ToolError) -> None:
    """Raise ``error`` unless the list at the end of the first sector is the one that grub-mkimage leaves there."""
    if not 2 * SECTOR_BYTES < len(core) <= LARGEST_CORE_BYTES:
        raise error
    _, sectors, segment = _BLOCK_LIST.unpack_from(core, _BLOCK_LIST_OFFSET)
    if (sectors, segment) != (core_sectors(core) - 1, _LOAD_SEGMENT):
        raise error


def _memdisk(configuration: str, modules: dict[str, bytes]) -> bytes:
    """Return a tar archive, the same for the same content: GRUB's own file system in memory."""
    files = {"grub/grub.cfg": configuration.encode()}
    files |= {f"grub/{name}.mod": content for name, content in modules.items()}
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def _program() -> str:
    for name in PROGRAMS:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin")
        if found is not None:
            return found
    raise ToolError("is not installed", subject=PROGRAMS[0], hint=_HINT)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ToolError(f"cannot be read: {error.strerror}", subject=str(path), hint=_HINT) from error


def _run(command: list[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"has not ended within {_TIMEOUT_SECONDS} s", subject=command[0]) from error
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", "replace").strip() or "nothing"
        raise ToolError(f"failed with status {done.returncode} and said: {said}", subject=command[0], hint=_HINT)
