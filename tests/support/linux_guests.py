"""Builds Generation 2 virtual machines of the layouts that Linux installations come in, from one Debian system.

Each is made without mounts, loop devices or device-mapper, kept in the cache and shared, so never written to. All run
``godwit-guest`` (see ``tests.support.debian_guest``), so ``tests.support.qemu.boot`` works on them. Their disks have
two or three partitions: the ESP, the root and, in some, /boot before it.

Run as a program it builds layouts: ``python -m tests.support.linux_guests [NAME...]``.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import debian_guest, qemu
from tests.support.debian_guest import ESP_SIZE_BYTES, ESP_START_BYTES, ESP_VOLUME_ID, MIB, ROOT_UUID, SIZE_BYTES

BOOT_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000006"
BOOT_PARTITION_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000007"
ESP_FILE_SYSTEM = f"{ESP_VOLUME_ID[:4]}-{ESP_VOLUME_ID[4:]}"
BOOT_START_BYTES = ESP_START_BYTES + ESP_SIZE_BYTES
BOOT_SIZE_BYTES = 128 * MIB
CONSOLE = "console=tty0 console=ttyS0,115200"
EXT4_OPTIONS = "-q -F -t ext4 -O '^orphan_file,^metadata_csum_seed'"
TOOLS = ("mkfs.xfs", "mkfs.btrfs", "dd")
PLAIN = "ext4"


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay a system out. ``make`` writes everything beside the partition table."""

    name: str
    make: Callable[[Layout, Path, Path], None]
    root: str  # the kernel's root= and what goes with it
    device: str  # of the root, in fstab
    kind: str = "ext4"
    options: str = "errors=remount-ro"  # in fstab
    separate_boot: bool = False
    root_type: str = "linux"
    prepare: str = ""  # run in the guest once, started directly, before it is kept
    files: dict[str, str] = field(default_factory=dict)

    @property
    def root_start_bytes(self) -> int:
        """Where the partition with the root begins."""
        return BOOT_START_BYTES + (BOOT_SIZE_BYTES if self.separate_boot else 0)

    @property
    def root_size_bytes(self) -> int:
        """The size of the partition with the root; the last MiB is the backup partition table's."""
        return SIZE_BYTES - self.root_start_bytes - MIB


def cached_guest(name: str) -> Path:
    """Return the raw disk of the layout called ``name``; ``ext4`` is ``debian_guest``'s. Raises GuestBuildError."""
    if name == PLAIN:
        return debian_guest.cached_guest()
    layout = LAYOUTS[name]
    text = Path(__file__).read_bytes() + Path(debian_guest.__file__).read_bytes()
    key = hashlib.sha256(text).hexdigest()[:16]
    return debian_guest.cached(f"linux-{name}", key, ".raw", lambda target: _build(layout, target))


def missing_tools() -> list[str]:
    """The programs that building needs and that are not installed."""
    found = [*debian_guest.missing_tools(), *qemu.missing_programs()]
    return found + [tool for tool in TOOLS if debian_guest.which(tool) is None]


def _build(layout: Layout, target: Path) -> None:
    with debian_guest.workshop(target) as (image, work):
        debian_guest.partition(image, _partitions(layout))
        layout.make(layout, image, work)
        if layout.prepare:
            done = qemu.boot(image, image_format="raw", commands=layout.prepare)
            if done.status != 0:
                raise debian_guest.GuestBuildError(f"{layout.name}: preparing failed:\n" + "\n".join(done.output))
            stub = _stub(ROOT_UUID, "/@/boot/grub").encode()
            debian_guest.update_esp(image, work, {"EFI/debian/grub.cfg": stub})


def _partitions(layout: Layout) -> str:
    lines = [
        "label: gpt",
        f"label-id: {debian_guest.DISK_UUID}",
        "unit: sectors",
        f"start={ESP_START_BYTES // 512}, size={ESP_SIZE_BYTES // 512}, type=uefi, uuid={debian_guest.ESP_UUID}",
    ]
    if layout.separate_boot:
        place = f"start={BOOT_START_BYTES // 512}, size={BOOT_SIZE_BYTES // 512}"
        lines.append(f"{place}, type=linux, uuid={BOOT_PARTITION_UUID}")
    place = f"start={layout.root_start_bytes // 512}, size={layout.root_size_bytes // 512}"
    lines.append(f"{place}, type={layout.root_type}, uuid={debian_guest.ROOT_PARTITION_UUID}")
    return "\n".join(lines) + "\n"


def _grub_esp(configuration: str) -> dict[str, bytes]:
    image = debian_guest.GRUB_IMAGE.read_bytes()
    names = ("EFI/debian/grubx64.efi", "EFI/BOOT/BOOTX64.EFI")
    return {"EFI/debian/grub.cfg": configuration.encode(), **dict.fromkeys(names, image)}


def _stub(uuid: str, folder: str) -> str:
    return f"search.fs_uuid {uuid} root\nset prefix=($root)'{folder}'\nconfigfile $prefix/grub.cfg\n"


def _grub_cfg(uuid: str, folder: str, command_line: str, *, linux: str = "linux", initrd: str = "initrd") -> str:
    kernel = debian_guest.kernel_version()
    return f"""\
set timeout=0
if [ -s $prefix/grubenv ]; then load_env; fi
if loadfont unicode; then insmod gfxterm; fi
menuentry 'Debian GNU/Linux' {{
    insmod gzio
    insmod part_gpt
    search --no-floppy --fs-uuid --set=root {uuid}
    {linux} {folder}/vmlinuz-{kernel} {command_line} ro {CONSOLE}
    {initrd} {folder}/initrd.img-{kernel}
}}
"""


def _fstab(layout: Layout) -> str:
    lines = [f"{layout.device} / {layout.kind} {layout.options} 0 1"]
    if layout.separate_boot:
        lines.append(f"UUID={BOOT_UUID} /boot ext4 defaults 0 2")
    lines.append(f"UUID={ESP_FILE_SYSTEM} /boot/efi vfat umask=0077 0 1")
    return "\n".join(lines) + "\n"


def _mke2fs(uuid: str, start_bytes: int, size_bytes: int, tree: str = ".", image: str = '"$GODWIT_IMAGE"') -> str:
    extended = f"offset={start_bytes},hash_seed={uuid},root_owner=0:0"
    return f"mke2fs {EXT4_OPTIONS} -U {uuid} -E {extended} -d {tree} {image} {size_bytes // 1024}k\n"


def _make_boot() -> str:
    """Moves /boot into a file system of its own; the folder of the ESP stays in it."""
    return _mke2fs(BOOT_UUID, BOOT_START_BYTES, BOOT_SIZE_BYTES, "boot") + "rm -rf boot/*\n"


def _make_plain(layout: Layout, image: Path, work: Path) -> None:
    """An ext4 root, /boot in it or apart, GRUB with Debian's stub on the ESP."""
    uuid, folder = (BOOT_UUID, "") if layout.separate_boot else (ROOT_UUID, "/boot")
    debian_guest.write_esp(image, work, _grub_esp(_stub(uuid, f"{folder}/grub")))
    files = {"etc/fstab": _fstab(layout), "boot/grub/grub.cfg": _grub_cfg(uuid, folder, layout.root), **layout.files}
    script = _make_boot() if layout.separate_boot else ""
    script += _mke2fs(ROOT_UUID, layout.root_start_bytes, layout.root_size_bytes)
    debian_guest.make_file_systems(image, work, files, script)


def _make_lvm(layout: Layout, image: Path, work: Path) -> None:
    """An ext4 root in a logical volume, /boot in it too: GRUB reads LVM."""
    debian_guest.write_esp(image, work, _grub_esp(_stub(ROOT_UUID, "/boot/grub")))
    files = {"etc/fstab": _fstab(layout), "boot/grub/grub.cfg": _grub_cfg(ROOT_UUID, "/boot", layout.root)}
    header, volume_bytes = lvm_header(layout.root_size_bytes)
    with image.open("r+b") as file:
        file.seek(layout.root_start_bytes)
        file.write(header)
    script = _mke2fs(ROOT_UUID, layout.root_start_bytes + len(header), volume_bytes)
    debian_guest.make_file_systems(image, work, files, script)


def lvm_header(size_bytes: int) -> tuple[bytes, int]:
    """Return the first MiB of a physical volume of ``size_bytes`` with one logical volume over all of it, and its size.

    The volume group is ``vg0``, the logical volume ``root``. Layout: LVM2's lib/format_text/layout.h.
    """
    extent_bytes = 4 * MIB
    extents = (size_bytes - MIB) // extent_bytes
    physical = "GoDwit-0000-0000-0000-0000-0000-000001"
    text = f"""vg0 {{
id = "GoDwit-0000-0000-0000-0000-0000-000002"
seqno = 2
format = "lvm2"
status = ["RESIZEABLE", "READ", "WRITE"]
flags = []
extent_size = {extent_bytes // 512}
max_lv = 0
max_pv = 0
metadata_copies = 0
physical_volumes {{
pv0 {{
id = "{physical}"
device = "/dev/sda2"
status = ["ALLOCATABLE"]
flags = []
dev_size = {size_bytes // 512}
pe_start = {MIB // 512}
pe_count = {extents}
}}
}}
logical_volumes {{
root {{
id = "GoDwit-0000-0000-0000-0000-0000-000003"
status = ["READ", "WRITE", "VISIBLE"]
flags = []
creation_time = 1700000000
creation_host = "godwit"
segment_count = 1
segment1 {{
start_extent = 0
extent_count = {extents}
type = "striped"
stripe_count = 1
stripes = [
"pv0", 0
]
}}
}}
}}
}}
contents = "Text Format Volume Group"
version = 1
description = ""
creation_host = "godwit"
creation_time = 1700000000
"""
    metadata = text.encode() + b"\0"
    area_start, area_size = 4096, MIB - 4096
    location = struct.pack("<QQII", 512, len(metadata), _lvm_crc(metadata), 0)
    area = b" LVM2 x[5A%r0N*>" + struct.pack("<IQQ", 1, area_start, area_size) + location
    area = area.ljust(508, b"\0")
    area = struct.pack("<I", _lvm_crc(area)) + area
    volume = physical.replace("-", "").encode() + struct.pack("<Q", size_bytes)
    volume += struct.pack("<4Q", MIB, 0, 0, 0) + struct.pack("<4Q", area_start, area_size, 0, 0)
    volume += struct.pack("<IIQQ", 2, 1, 0, 0)
    label = (struct.pack("<I8s", 32, b"LVM2 001") + volume).ljust(512 - 20, b"\0")
    label = b"LABELONE" + struct.pack("<QI", 1, _lvm_crc(label)) + label
    start = (b"\0" * 512 + label).ljust(area_start, b"\0")
    return (start + area + metadata).ljust(MIB, b"\0"), extents * extent_bytes


def _lvm_crc(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _make_xfs(layout: Layout, image: Path, work: Path) -> None:
    """An XFS root with /boot in it, described to mkfs.xfs file by file; owners come from the archive."""
    debian_guest.write_esp(image, work, _grub_esp(_stub(ROOT_UUID, "/boot/grub")))
    files = {"etc/fstab": _fstab(layout), "boot/grub/grub.cfg": _grub_cfg(ROOT_UUID, "/boot", layout.root)}
    (work / "proto").write_text(_xfs_prototype(work, files))
    size = layout.root_size_bytes
    script = f"""\
truncate -s {size} "$GODWIT_WORK/root.img"
mkfs.xfs -q -m uuid={ROOT_UUID} -p "$GODWIT_WORK/proto" "$GODWIT_WORK/root.img"
""" + _copy_root(layout)
    debian_guest.make_file_systems(image, work, files, script)


def _copy_root(layout: Layout) -> str:
    return f"""\
dd if="$GODWIT_WORK/root.img" of="$GODWIT_IMAGE" bs=1M seek={layout.root_start_bytes // MIB} \\
    conv=notrunc,sparse status=none
rm "$GODWIT_WORK/root.img"
"""


def _xfs_prototype(work: Path, files: dict[str, str]) -> str:
    """Return mkfs.xfs's description of the system with ``files``, whose names must be there or in a folder that is."""
    folders: dict[str, dict[str, str]] = {"": {}}
    with tarfile.open(debian_guest.cached_system()) as archive:
        for member in archive.getmembers():
            name = member.name.removeprefix(".").removeprefix("/")
            if not name or name.startswith("dev/") or any(character.isspace() for character in name):
                continue
            parent, _, last = name.rpartition("/")
            kind, rest = "-", f"{work}/tree/{name}"
            if member.isdir():
                kind, rest = "d", ""
                folders.setdefault(name, {})
            elif member.issym():
                kind, rest = "l", member.linkname
            elif not (member.isreg() or member.islnk()):
                continue
            mode = ("u" if member.mode & 0o4000 else "-") + ("g" if member.mode & 0o2000 else "-")
            line = f"{kind}{mode}{member.mode & 0o777:03o} {member.uid} {member.gid} {rest}"
            folders.setdefault(parent, {})[last] = line.rstrip()
    for name in files:
        parent, _, last = name.rpartition("/")
        folders[parent][last] = f"---644 0 0 {work}/tree/{name}"
    lines = ["no-boot-program", "0 0", "d--755 0 0"]

    def walk(folder: str) -> None:
        for last, line in sorted(folders.get(folder, {}).items()):
            lines.append(f"{last} {line}")
            if line.startswith("d"):
                walk(f"{folder}/{last}".lstrip("/"))
        lines.append("$")

    walk("")
    return "\n".join(lines) + "\n"


def _make_btrfs(layout: Layout, image: Path, work: Path) -> None:
    """A btrfs root. mkfs.btrfs fills the top level; the guest itself makes the subvolume of it, at its first start."""
    kernel = debian_guest.kernel_version()
    first = f"""\
search.fs_uuid {ROOT_UUID} root
linux ($root)/boot/vmlinuz-{kernel} root=UUID={ROOT_UUID} ro {CONSOLE}
initrd ($root)/boot/initrd.img-{kernel}
boot
"""
    debian_guest.write_esp(image, work, _grub_esp(first))
    files = {"etc/fstab": _fstab(layout), "boot/grub/grub.cfg": _grub_cfg(ROOT_UUID, "/@/boot", layout.root)}
    script = f"""\
truncate -s {layout.root_size_bytes} "$GODWIT_WORK/root.img"
mkfs.btrfs -q -U {ROOT_UUID} --rootdir . "$GODWIT_WORK/root.img"
""" + _copy_root(layout)
    debian_guest.make_file_systems(image, work, files, script)


def _make_systemd_boot(layout: Layout, image: Path, work: Path) -> None:
    """systemd-boot, its entries and the kernel on the ESP; an ext4 root."""
    kernel = debian_guest.kernel_version()
    folder = f"{debian_guest.MACHINE_ID}/{kernel}"
    loader = debian_guest.system_file("usr/lib/systemd/boot/efi/systemd-bootx64.efi")
    entry = f"""\
title      Debian GNU/Linux 12 (bookworm)
version    {kernel}
machine-id {debian_guest.MACHINE_ID}
sort-key   debian
options    {layout.root} ro {CONSOLE}
linux      /{folder}/linux
initrd     /{folder}/initrd.img-{kernel}
"""
    esp = {
        "EFI/BOOT/BOOTX64.EFI": loader,
        "EFI/systemd/systemd-bootx64.efi": loader,
        "loader/loader.conf": b"timeout 0\nconsole-mode keep\n",
        f"loader/entries/{debian_guest.MACHINE_ID}-{kernel}.conf": entry.encode(),
        f"{folder}/linux": debian_guest.system_file(f"boot/vmlinuz-{kernel}"),
        f"{folder}/initrd.img-{kernel}": debian_guest.system_file(f"boot/initrd.img-{kernel}"),
    }
    debian_guest.write_esp(image, work, esp)
    script = "rm boot/vmlinuz-* boot/initrd.img-*\n" + _mke2fs(
        ROOT_UUID, layout.root_start_bytes, layout.root_size_bytes
    )
    debian_guest.make_file_systems(image, work, {"etc/fstab": _fstab(layout)}, script)


def _make_unified(layout: Layout, image: Path, work: Path) -> None:
    """A unified kernel image that the firmware starts itself; an ext4 root."""
    kernel = debian_guest.kernel_version()
    unified = unified_image(
        debian_guest.system_file("usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
        {
            ".osrel": debian_guest.system_file("usr/lib/os-release"),
            ".cmdline": f"{layout.root} ro {CONSOLE}".encode(),
            ".uname": kernel.encode(),
            ".linux": debian_guest.system_file(f"boot/vmlinuz-{kernel}"),
            ".initrd": debian_guest.system_file(f"boot/initrd.img-{kernel}"),
        },
    )
    debian_guest.write_esp(image, work, {"EFI/BOOT/BOOTX64.EFI": unified, f"EFI/Linux/debian-{kernel}.efi": b""})
    script = "rm boot/vmlinuz-* boot/initrd.img-*\n" + _mke2fs(
        ROOT_UUID, layout.root_start_bytes, layout.root_size_bytes
    )
    debian_guest.make_file_systems(image, work, {"etc/fstab": _fstab(layout)}, script)


def unified_image(stub: bytes, sections: dict[str, bytes]) -> bytes:
    """Return systemd's ``stub`` with ``sections`` added after its own, as objcopy would."""
    header = struct.unpack_from("<I", stub, 0x3C)[0]
    count, optional = struct.unpack_from("<H", stub, header + 6)[0], struct.unpack_from("<H", stub, header + 20)[0]
    table = header + 24 + optional
    section_alignment, file_alignment = struct.unpack_from("<II", stub, header + 24 + 32)
    image = bytearray(stub.ljust(-(-len(stub) // file_alignment) * file_alignment, b"\0"))
    last = table + 40 * (count - 1)
    size, address = struct.unpack_from("<II", stub, last + 8)
    following = address + size
    first_content = min(struct.unpack_from("<I", stub, table + 40 * index + 20)[0] or 1 << 32 for index in range(count))
    assert table + 40 * (count + len(sections)) <= first_content, "the stub has no room for more sections"
    for index, (name, content) in enumerate(sections.items()):
        following = -(-following // section_alignment) * section_alignment
        padded = -(-len(content) // file_alignment) * file_alignment
        entry = struct.pack("<8sIIII", name.encode(), len(content), following, padded, len(image))
        entry += struct.pack("<IIHHI", 0, 0, 0, 0, 0x40000040)
        image[table + 40 * (count + index) : table + 40 * (count + index + 1)] = entry
        image += content.ljust(padded, b"\0")
        following += len(content)
    struct.pack_into("<H", image, header + 6, count + len(sections))
    size_of_image = -(-following // section_alignment) * section_alignment
    struct.pack_into("<I", image, header + 24 + 56, size_of_image)
    return bytes(image)


def _make_red_hat(layout: Layout, image: Path, work: Path) -> None:
    """As Red Hat does it: a /boot of its own with loader entries, ``blscfg`` and ``linuxefi`` in grub.cfg.

    Debian's GRUB for UEFI has no blscfg, so under UEFI the ESP's configuration starts the kernel itself.
    """
    kernel = debian_guest.kernel_version()
    direct = _grub_cfg(BOOT_UUID, "", layout.root, linux="linuxefi", initrd="initrdefi")
    debian_guest.write_esp(image, work, _grub_esp(direct))
    configuration = f"""\
set pager=1
if [ -f ${{config_directory}}/grubenv ]; then
  load_env -f ${{config_directory}}/grubenv
elif [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${{next_entry}}" ] ; then
   set default="${{next_entry}}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="${{saved_entry}}"
fi
function load_video {{
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  else
    insmod efi_gop
    insmod efi_uga
  fi
}}
terminal_output console
set timeout=0
insmod increment
if [ -n "${{boot_counter}}" -a "${{boot_success}}" = "0" ]; then
  if [ "${{boot_counter}}" = "0" ]; then set default=1; else decrement boot_counter; save_env boot_counter; fi
fi
insmod part_gpt
insmod ext2
search --no-floppy --fs-uuid --set=root {BOOT_UUID}
insmod blscfg
blscfg
if [ "$grub_platform" = "efi" ]; then
    menuentry 'UEFI Firmware Settings' --id 'uefi-firmware' {{ fwsetup }}
fi
"""
    environment = f"# GRUB Environment Block\nsaved_entry={debian_guest.MACHINE_ID}-{kernel}\n"
    environment += f"kernelopts={layout.root} ro {CONSOLE}\nboot_success=0\n"
    entry = f"""\
title Debian as Red Hat would have it ({kernel}) 12 (Bookworm)
version {kernel}
linux /vmlinuz-{kernel}
initrd /initrd.img-{kernel} $tuned_initrd
options $kernelopts $tuned_params
id debian-{kernel}
grub_users $grub_users
grub_arg --unrestricted
grub_class kernel
"""
    files = {
        "etc/fstab": _fstab(layout),
        "boot/grub2/grub.cfg": configuration,
        "boot/grub2/grubenv": environment.ljust(1024, "#"),
        f"boot/loader/entries/{debian_guest.MACHINE_ID}-{kernel}.conf": entry,
    }
    script = _make_boot() + _mke2fs(ROOT_UUID, layout.root_start_bytes, layout.root_size_bytes)
    debian_guest.make_file_systems(image, work, files, script)


BY_UUID, BY_PARTUUID = f"UUID={ROOT_UUID}", f"PARTUUID={debian_guest.ROOT_PARTITION_UUID}"
SUBVOLUME = "btrfs subvolume snapshot / /@ && rm -rf /boot/vmlinuz* /boot/initrd* /boot/grub"
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("lvm", _make_lvm, "root=/dev/mapper/vg0-root", "/dev/mapper/vg0-root", root_type="lvm"),
        Layout("boot", _make_plain, f"root={BY_UUID}", BY_UUID, separate_boot=True),
        Layout("xfs", _make_xfs, f"root={BY_UUID}", BY_UUID, kind="xfs", options="defaults"),
        Layout(
            *("btrfs", _make_btrfs, f"root={BY_UUID} rootflags=subvol=@", BY_UUID),
            kind="btrfs",
            options="defaults,subvol=@",
            prepare=SUBVOLUME,
        ),
        Layout("partuuid", _make_plain, f"root={BY_PARTUUID}", BY_PARTUUID),
        Layout("systemd-boot", _make_systemd_boot, f"root={BY_UUID}", BY_UUID),
        Layout("unified", _make_unified, f"root={BY_UUID}", BY_UUID),
        Layout("red-hat", _make_red_hat, f"root={BY_UUID}", BY_UUID, separate_boot=True),
    )
}


def main() -> None:
    """Build the layouts named, or all."""
    for name in sys.argv[1:] or (PLAIN, *LAYOUTS):
        started = time.monotonic()
        path = cached_guest(name)
        print(f"{name}: {path} in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
