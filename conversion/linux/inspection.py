"""Putting together what a Linux system on a disk is: from its partitions to ``LinuxSystem``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from conversion.errors import ConversionError
from conversion.filesystems.btrfs import BtrfsFileSystem
from conversion.filesystems.filesystem import FileSystem
from conversion.finding import Finding
from conversion.linux import rules
from conversion.linux.commandline import parse_fstab, resolve
from conversion.linux.files import bytes_of, names_in, text_of, window
from conversion.linux.grubconfig import FOLDERS, environment_of, read_config, read_stubs
from conversion.linux.loaderentries import read_entries, read_systemd_boot
from conversion.linux.osrelease import parse_os_release
from conversion.linux.system import (
    Architecture,
    BootEntry,
    Distribution,
    Edit,
    EntriesFolder,
    FstabEntry,
    GrubConfig,
    GrubStub,
    Kernel,
    LinuxSystem,
    Partition,
    SystemdBoot,
    UnifiedKernel,
    Volume,
    unified_entry,
)
from conversion.linux.tablereferences import fstab_edits, root_findings
from conversion.linux.unified import architecture_of, read_unified
from conversion.linux.volumes import Found, find_volumes

EFI_SYSTEM: Final = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
EXTENDED_BOOT: Final = UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172")
_OS_RELEASE: Final = ("/etc/os-release", "/usr/lib/os-release")
_PROGRAMS: Final = ("/bin/sh", "/usr/bin/env", "/bin/busybox", "/sbin/init", "/usr/lib/systemd/systemd")
_KERNEL: Final = re.compile(r"(?:vmlinuz|vmlinux|kernel|bzImage|Image)(?:-(.+))?")
_ENTRY_FOLDERS: Final = ("/loader/entries", "/boot/loader/entries")
_FALLBACK: Final = "/EFI/BOOT/BOOTX64.EFI"  # may be a unified image itself, where it is the only one
MOST_SUBVOLUMES: Final = 64
MOST_UNIFIED: Final = 64


@dataclass(frozen=True, slots=True)
class _Root:
    volume: Volume
    path: str  # on the volume: "" or "/@"
    file_system: FileSystem  # whose paths begin at the root


@dataclass(slots=True)
class _Boot:
    """What starts the system, as it is collected."""

    grub: list[GrubConfig] = field(default_factory=list)
    stubs: list[GrubStub] = field(default_factory=list)
    folders: list[EntriesFolder] = field(default_factory=list)
    unified: list[UnifiedKernel] = field(default_factory=list)
    systemd_boot: SystemdBoot | None = None

    def entries(self) -> list[BootEntry]:
        found = [entry for config in self.grub for entry in config.entries]
        found += [entry for folder in self.folders for entry in folder.entries]
        return found + [unified_entry(unified) for unified in self.unified]


def inspect_linux(partitions: Sequence[Partition]) -> LinuxSystem | None:
    """Return what the Linux system on these partitions is; None where nothing on them is Linux's.

    Pure: it only reads, some MiB at most. A guest that is strange, damaged or refused is so by its findings, never by
    an error; errors of the devices themselves (a disk that fails, a store that is out of reach) pass through.
    """
    found = find_volumes(partitions)
    if not found.is_linux:
        return None
    candidates = [root for volume in found.volumes for root in _roots_on(volume)]
    boot = _read_boot(found.volumes, candidates)
    root = _choose_root(candidates, boot.entries(), found.volumes)
    fstab: tuple[FstabEntry, ...] = ()
    edits, findings = list[Edit](), list[Finding]()
    if root is not None:
        fstab = parse_fstab(bytes_of(root.file_system, "/etc/fstab") or b"")
        edits, findings = fstab_edits(root.volume, root.file_system, root.path, found.volumes)
    findings += root_findings(boot.entries(), root.volume if root else None)
    kernels = _kernels(found.volumes, candidates)
    architecture = _architecture(root, kernels, boot)
    findings += _judge(found, root, boot, kernels, architecture)
    return LinuxSystem(
        volumes=found.volumes,
        distribution=_distribution(root),
        architecture=architecture,
        root=root.volume if root else None,
        root_path=root.path if root else "",
        root_file_system=root.file_system if root else None,
        kernels=kernels,
        grub=tuple(boot.grub),
        grub_stubs=tuple(boot.stubs),
        systemd_boot=boot.systemd_boot,
        entries_folders=tuple(boot.folders),
        unified_kernels=tuple(boot.unified),
        fstab=fstab,
        edits=tuple(edits),
        findings=(*found.findings, *findings),
    )


def _is_esp(volume: Volume) -> bool:
    partition = volume.partition
    marked = partition is not None and partition.type_guid == EFI_SYSTEM
    return volume.probed.kind == "vfat" and (
        marked or bool(volume.file_system and names_in(volume.file_system, "/EFI"))
    )


# -- the root


def _roots_on(volume: Volume) -> list[_Root]:
    """Return the roots on a volume: on btrfs there may be one in each subvolume."""
    if volume.file_system is None or volume.probed.kind in {"vfat", "ntfs"}:
        return []
    if not isinstance(volume.file_system, BtrfsFileSystem):
        return [_Root(volume, "", volume.file_system)] if _is_root(volume.file_system) else []
    found = []
    try:
        default = volume.file_system.default_subvolume_id()
        subvolumes = sorted(volume.file_system.subvolumes(), key=lambda one: (one.id != default, one.id))
        for subvolume in subvolumes[:MOST_SUBVOLUMES]:
            view = volume.file_system.subvolume(subvolume.id)
            if view is not None and _is_root(view):
                found.append(_Root(volume, f"/{subvolume.path}" if subvolume.path else "", view))
    except ConversionError:
        pass  # the volume says of itself that it is damaged where its root cannot be found
    return found


def _is_root(file_system: FileSystem) -> bool:
    has_release = any(text_of(file_system, path) is not None for path in _OS_RELEASE)
    return has_release or text_of(file_system, "/etc/fstab") is not None


def _choose_root(candidates: Sequence[_Root], entries: Sequence[BootEntry], volumes: Sequence[Volume]) -> _Root | None:
    """Return the root that the first boot entry which names one of the candidates names, else the first candidate."""
    for entry in entries:
        named = resolve(entry.root, volumes)
        on_it = [root for root in candidates if root.volume is named]
        wanted = _subvolume_path(entry.root_subvolume, named)
        exact = [root for root in on_it if wanted is None or root.path.strip("/") == wanted]
        if exact or on_it:
            return (exact or on_it)[0]
    with_release = [root for root in candidates if _distribution(root) is not None]
    return next(iter(with_release or candidates), None)


def _subvolume_path(subvolume: str | None, volume: Volume | None) -> str | None:
    if subvolume is None or not subvolume.startswith("id:") or volume is None:
        return subvolume
    if not isinstance(volume.file_system, BtrfsFileSystem):
        return None
    try:
        return next((one.path for one in volume.file_system.subvolumes() if f"id:{one.id}" == subvolume), None)
    except ConversionError:
        return None


def _distribution(root: _Root | None) -> Distribution | None:
    texts = (text_of(root.file_system, path) for path in _OS_RELEASE) if root else ()
    text = next((text for text in texts if text is not None), None)
    return parse_os_release(text) if text is not None else None


# -- what starts it


def _read_boot(volumes: Sequence[Volume], candidates: Sequence[_Root]) -> _Boot:
    boot = _Boot()

    def by_uuid(uuid: str) -> Volume | None:
        return next((volume for volume in volumes if volume.uuid.lower() == uuid.lower()), None)

    environment: dict[str, str] = {}
    for volume in volumes:
        file_system = volume.file_system
        if file_system is None or volume.probed.kind == "ntfs":
            continue
        prefixes = ["", *(root.path for root in candidates if root.volume is volume and root.path)]
        for folder in _config_folders(volume, file_system, prefixes):
            environment.update(environment_of(file_system, folder))
            config = read_config(volume, file_system, folder, by_uuid)
            if config is not None:
                boot.grub.append(config)
        if _is_esp(volume):
            boot.stubs += read_stubs(volume, file_system)
            boot.systemd_boot = boot.systemd_boot or read_systemd_boot(volume, file_system)
    for volume in volumes:
        if volume.file_system is not None and volume.probed.kind != "ntfs":
            _read_entries(boot, volume, volume.file_system, candidates, environment)
    return boot


def _config_folders(volume: Volume, file_system: FileSystem, prefixes: Sequence[str]) -> list[str]:
    """Return where a grub.cfg may be; on an ESP below /EFI too, as Red Hat had it."""
    folders = [prefix + folder for prefix in prefixes for folder in FOLDERS]
    if _is_esp(volume):
        folders += [f"/EFI/{item.name}" for item in names_in(file_system, "/EFI")[:64] if item.kind == "folder"]
    return folders


def _read_entries(
    boot: _Boot,
    volume: Volume,
    file_system: FileSystem,
    candidates: Sequence[_Root],
    environment: dict[str, str],
) -> None:
    prefixes = ["", *(root.path for root in candidates if root.volume is volume and root.path)]
    for folder in (prefix + folder for prefix in prefixes for folder in _ENTRY_FOLDERS):
        entries = read_entries(volume, file_system, folder, environment)
        if entries is not None:
            boot.folders.append(entries)
    is_extended = volume.partition is not None and volume.partition.type_guid == EXTENDED_BOOT
    if volume.probed.kind == "vfat" or is_extended:
        names = [item.name for item in names_in(file_system, "/EFI/Linux") if item.name.lower().endswith(".efi")]
        paths = [*(f"/EFI/Linux/{name}" for name in names[:MOST_UNIFIED]), _FALLBACK]
        unified = [one for path in paths if (one := read_unified(volume, path)) is not None]
        boot.unified += unified[:-1] if len(unified) > 1 and unified[-1].path == _FALLBACK else unified


# -- kernels


def _kernels(volumes: Sequence[Volume], candidates: Sequence[_Root]) -> tuple[Kernel, ...]:
    """Return the kernels in /boot of the roots and at the top of other file systems, by version, newest first."""
    found: dict[tuple[int, str], Kernel] = {}
    for index, volume in enumerate(volumes):
        if volume.file_system is None or volume.probed.kind == "ntfs":
            continue
        prefixes = {"", *(root.path for root in candidates if root.volume is volume)}
        for folder in sorted({f"{prefix}/boot" for prefix in prefixes} | {""}):
            names = [item.name for item in names_in(volume.file_system, folder or "/") if item.kind == "file"]
            for name in names:
                matched = _KERNEL.fullmatch(name)
                if matched and not name.endswith((".old", ".hmac")):
                    version = matched[1] or ""
                    initrd = _initrd(set(names), version)
                    image = f"{folder}/{name}"
                    found[index, image] = Kernel(version, image, f"{folder}/{initrd}" if initrd else None, volume)
    return tuple(sorted(found.values(), key=lambda kernel: _version_key(kernel.version), reverse=True))


def _initrd(names: set[str], version: str) -> str | None:
    suffix = f"-{version}" if version else ""
    stems = (
        f"initrd.img{suffix}",
        f"initramfs{suffix}.img",
        f"initrd{suffix}",
        f"initrd{suffix}.img",
        f"initramfs{suffix}",
    )
    return next((name for name in stems if name in names), None)


def _version_key(version: str) -> tuple[tuple[int, str], ...]:
    parts = re.findall(r"\d+|[^\d]+", version)
    return tuple((int(part[:18]), "") if part.isdecimal() else (-1, part) for part in parts)


def _architecture(root: _Root | None, kernels: Sequence[Kernel], boot: _Boot) -> Architecture:
    """Return the machine that the root's programs are for, else the kernels'."""
    for path in _PROGRAMS if root is not None else ():
        content = bytes_of(root.file_system, path, largest_bytes=16 << 20) if root else None
        machine = architecture_of(content[:4096]) if content else None
        if machine is not None:
            return machine
    images = [(kernel.volume, kernel.image) for kernel in kernels]
    images += [(unified.volume, unified.path) for unified in boot.unified]
    images += [(entry.volume, entry.kernel) for entry in boot.entries() if entry.volume is not None]
    for volume, path in images[:32]:
        head = window(volume, path, 0, 4096)
        machine = architecture_of(head) if head else None
        if machine is not None:
            return machine
    return "unknown"


def _judge(
    found: Found, root: _Root | None, boot: _Boot, kernels: Sequence[Kernel], architecture: Architecture
) -> list[Finding]:
    has_config = bool(boot.grub or boot.folders or boot.unified)
    findings = rules.of_encryption(found, has_root=root is not None, has_boot=has_config)
    findings += rules.of_architecture(architecture)
    if root is None and not found.encrypted:
        findings.append(rules.unreadable_root([volume for volume in found.volumes if volume.trouble]))
    if not has_config and not found.encrypted:
        findings.append(rules.no_boot_configuration(boot.stubs))
    if not kernels and not boot.unified and not _has_kernel(boot.entries()):
        findings.append(rules.no_kernel())
    esps = [volume for volume in found.volumes if _is_esp(volume)]
    findings += rules.of_secure_boot(esps)
    if root is not None:
        findings += rules.of_initrds(root.file_system)
    return findings


def _has_kernel(entries: Sequence[BootEntry]) -> bool:
    return any(entry.volume is not None and window(entry.volume, entry.kernel, 0, 1) for entry in entries[:32])
