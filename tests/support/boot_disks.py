"""Small disks for a BIOS, with stubs of our own where a kernel or a boot manager would be: they tell what they found.

The stubs are assembled by nasm and print to the first serial port. A machine that runs one is there in two seconds.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from conversion import bootscript, grub
from tests.support import qemu
from tests.support.debian_guest import PATH

MIB = 1 << 20
SECTOR = 512
CORE_LBA = 34
SIGNATURE = 0x60D17001
TOOLS = ("nasm", "mkfs.vfat", "mcopy", "mmd", "mke2fs", "mkntfs", "ntfscp", "grub-mkimage", qemu.QEMU)

# A bzImage whose 32-bit entry prints what it was given: the command line, and the initial RAM disk as text.
KERNEL = r"""
bits 16
org 0
    times 0x1f1 db 0
    db 1                    ; setup sectors after the first
    dw 0
    dd 1
    times 0x1fe - ($ - $$) db 0
    dw 0xaa55
    db 0xeb, 0x66
    db "HdrS"
    dw 0x0206
    times 0x211 - ($ - $$) db 0
    db 1                    ; loaded high
    dw 0
    dd 0x100000             ; entry
    times 0x22c - ($ - $$) db 0
    dd 0x37ffffff           ; highest address of the RAM disk
    dd 0x1000
    db 0, 0
    dw 0
    dd 2047                 ; longest command line
    times 1024 - ($ - $$) db 0
bits 32
    mov ebx, [esi + 0x218]
    mov edi, [esi + 0x21c]
    mov ebp, [esi + 0x228]
    call here
here:
    pop ecx
    sub ecx, here
    push ecx
    lea esi, [ecx + text_command]
    call print
    mov esi, ebp
    call print
    mov ecx, [esp]
    lea esi, [ecx + text_initrd]
    call print
    mov esi, ebx
    mov ecx, edi
    jecxz .empty
.initrd:
    lodsb
    call put
    loop .initrd
.empty:
    mov ecx, [esp]
    lea esi, [ecx + text_end]
    call print
.halt:
    hlt
    jmp .halt
print:
    lodsb
    test al, al
    jz .done
    call put
    jmp print
.done:
    ret
put:
    mov ah, al
    mov dx, 0x3fd
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    ret
text_command: db 10, "STUB-COMMAND ", 0
text_initrd: db 10, "STUB-INITRD ", 0
text_end: db 10, "STUB-END", 10, 0
    times 4096 - ($ - $$) db 0
"""

# A boot manager: what GRUB's ntldr starts at 2000:0000 with the drive in DL and the volume's boot sector at 0:7c00.
BOOTMGR = r"""
bits 16
org 0
    call here
here:
    pop bp
    sub bp, here            ; 0 where the offset is right
    mov bx, cs
    push cs
    pop ds
    push dx
    mov si, text_cs
    call print
    mov ax, bx
    call hex
    mov si, text_ip
    call print
    mov ax, bp
    call hex
    mov si, text_dl
    call print
    pop ax
    xor ah, ah
    call hex
    xor ax, ax
    mov es, ax
    mov si, text_hidden
    call print
    mov ax, [es:0x7c00 + 0x1e]
    call hex
    mov ax, [es:0x7c00 + 0x1c]
    call hex
    mov si, text_name
    call print
    mov cx, 8
    mov di, 0x7c03
.name:
    mov al, [es:di]
    call put
    inc di
    loop .name
    mov si, text_end
    call print
.halt:
    hlt
    jmp .halt
print:
    lodsb
    test al, al
    jz .done
    call put
    jmp print
.done:
    ret
hex:
    mov cx, 4
.digit:
    rol ax, 4
    push ax
    and al, 15
    add al, '0'
    cmp al, '9'
    jbe .low
    add al, 'a' - '0' - 10
.low:
    call put
    pop ax
    loop .digit
    ret
put:
    push dx
    mov ah, al
    mov dx, 0x3fd
.wait:
    in al, dx
    test al, 0x20
    jz .wait
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    pop dx
    ret
text_cs: db 10, "STUB-BOOTMGR cs=", 0
text_ip: db " ip=", 0
text_dl: db " dl=", 0
text_hidden: db " hidden=", 0
text_name: db " oem=", 0
text_end: db 10, "STUB-END", 10, 0
    times 8192 - ($ - $$) db 0
"""


@dataclass(frozen=True, slots=True)
class Partition:
    """An entry of an MBR. A logical one is described by a sector of its own, the one 64 sectors before it."""

    start_sector: int
    sectors: int
    kind: int
    logical: bool = False
    active: bool = False


def missing_tools() -> list[str]:
    """The programs that making and starting such disks needs and that are not installed."""
    missing = [tool for tool in TOOLS if not installed(tool)]
    return missing if (grub.DIRECTORY / "boot.img").exists() else [*missing, str(grub.DIRECTORY)]


def installed(tool: str) -> bool:
    """Whether a program is installed, those of administrators included."""
    return shutil.which(tool, path=PATH) is not None


def assemble(source: str, folder: Path, name: str) -> Path:
    """Return a file with what nasm makes of ``source``."""
    text, target = folder / f"{name}.asm", folder / name
    text.write_text(source)
    run("nasm", "-f", "bin", "-o", target, text)
    return target


def write_mbr(disk: Path, partitions: list[Partition], *, signature: int = SIGNATURE) -> None:
    """Write partition entries, and the chain of extended ones, around whatever boot code is there."""
    logical = [partition for partition in partitions if partition.logical]
    primary = [partition for partition in partitions if not partition.logical]
    if logical:
        first = logical[0].start_sector - 64
        end = logical[-1].start_sector + logical[-1].sectors
        primary.append(Partition(first, end - first, 0x0F))
    with disk.open("r+b") as file:
        table = b"".join(_entry(partition) for partition in primary).ljust(64, b"\0")
        file.seek(440)
        file.write(struct.pack("<IH", signature, 0) + table + b"\x55\xaa")
        for index, partition in enumerate(logical):
            record = partition.start_sector - 64
            entries = [_entry(Partition(64, partition.sectors, partition.kind))]
            if index + 1 < len(logical):
                following = logical[index + 1]
                entries.append(_entry(Partition(following.start_sector - 64 - first, following.sectors + 64, 0x0F)))
            file.seek(record * SECTOR)
            file.write(b"\0" * 446 + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa")


def install_chain(disk: Path, script: bootscript.BootScript) -> bytes:
    """Write boot code and core with ``script`` to a disk, the partition entries left alone; return the core."""
    core = grub.build_core(script.configuration, script.modules, late_modules=script.late_modules)
    with disk.open("r+b") as file:
        file.write(grub.boot_code(CORE_LBA))
        file.seek(CORE_LBA * SECTOR)
        file.write(grub.place_core(core, CORE_LBA))
    return core


def sparse_file(path: Path, size: int) -> Path:
    """Return ``path``, a sparse file of ``size`` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def make_fat(disk: Path, start_sector: int, sectors: int, files: dict[str, bytes | Path], *, volume: str) -> None:
    """Make a FAT32 file system in place, with its own hidden sectors left 0, and put ``files`` in."""
    run(
        *("mkfs.vfat", "-F", "32", "-s", "1", "-i", volume),
        *("--offset", str(start_sector), disk, str(sectors // 2)),
    )
    drive = f"{disk}@@{start_sector * SECTOR}"
    for folder in _folders(files):
        run("mmd", "-i", drive, f"::{folder}")
    for name, content in files.items():
        run("mcopy", "-i", drive, _file(disk, content), f"::{name}")


def make_ext4(disk: Path, start_sector: int, sectors: int, files: dict[str, bytes | Path], *, uuid: str) -> None:
    """Make an ext4 file system in place with ``files`` in."""
    tree = disk.with_suffix(".tree")
    for name, content in files.items():
        target = tree / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_file(disk, content), target)
    tree.mkdir(exist_ok=True)
    run(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-U", uuid, "-d", tree),
        *("-E", f"offset={start_sector * SECTOR}", disk, f"{sectors // 2}k"),
    )
    shutil.rmtree(tree)


def make_ntfs(disk: Path, start_sector: int, sectors: int, files: dict[str, bytes | Path]) -> str:
    """Make an NTFS file system in place with ``files`` in its root; return its serial number as GRUB writes it."""
    volume = sparse_file(disk.with_suffix(".ntfs"), sectors * SECTOR)
    run("mkntfs", "-q", "-F", "-f", "-p", str(start_sector), "-H", "255", "-S", "63", volume)
    for name, content in files.items():
        run("ntfscp", "-q", volume, _file(disk, content), name.lstrip("/"))
    run("dd", f"if={volume}", f"of={disk}", "bs=1M", f"seek={start_sector * SECTOR // MIB}", "conv=notrunc,sparse")
    content = volume.read_bytes()
    volume.unlink()
    return f"{struct.unpack_from('<Q', content, 0x48)[0]:016x}"


def run_stub(disk: Path, *, end: str = "STUB-END") -> list[str]:
    """Start a machine with a BIOS and ``disk`` on IDE; return its console's lines once a stub has ended."""
    with qemu.Machine(disk, firmware="seabios", image_format="raw", keep_disk=True, bus="ide") as machine:
        machine.wait_for(end)
        return machine.console.split("\n")


def run(*command: str | Path, stdin: bytes = b"") -> str:
    """Run a program; what it says where it fails is in the error."""
    done = subprocess.run(
        [shutil.which(str(command[0]), path=PATH) or str(command[0]), *map(str, command[1:])],
        check=False,
        input=stdin,
        capture_output=True,
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, f"{' '.join(map(str, command))}: status {done.returncode}\n{said}"
    return done.stdout.decode("utf-8", "replace")


def _entry(partition: Partition) -> bytes:
    # No cylinders, heads and sectors: whoever reads this goes by the sector numbers.
    chs = b"\xfe\xff\xff"
    flag = 0x80 if partition.active else 0
    return struct.pack("<B3sB3sII", flag, chs, partition.kind, chs, partition.start_sector, partition.sectors)


def _folders(files: dict[str, bytes | Path]) -> list[str]:
    parents = {str(parent) for name in files for parent in Path("/", name).parents}
    return sorted(parents - {"/"})


def _file(disk: Path, content: bytes | Path) -> Path:
    if isinstance(content, Path):
        return content
    path = disk.with_suffix(".content")
    path.write_bytes(content)
    return path
