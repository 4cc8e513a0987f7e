"""What UEFI starts when it knows no boot entry of its own: \\EFI\\BOOT\\BOOTX64.EFI, made sure of for Linux."""

from __future__ import annotations

from typing import Final

from conversion.filesystems.fat import FatFileSystem
from conversion.finding import Finding, Severity
from conversion.overlay import Overlay

FALLBACK: Final = "/EFI/BOOT/BOOTX64.EFI"
LARGEST_PROGRAM_BYTES: Final = 64 << 20
# Of a folder with both, the shim goes by the fallback's name, and finds its GRUB beside it.
_SHIMS: Final = ("shimx64.efi",)
_BESIDE_SHIM: Final = ("grubx64.efi", "mmx64.efi")
_LOADERS: Final = ("systemd-bootx64.efi", "grubx64.efi")


def ensure_fallback(esp: FatFileSystem, subject: str, overlay: Overlay) -> Finding | None:
    """Write the fallback program where there is none, from the loader that is there; say so where none is.

    A converted machine comes home to a firmware that has forgotten its boot entries. Raises NoSpaceError, DamagedError.
    """
    if esp.read_file(FALLBACK, largest_bytes=LARGEST_PROGRAM_BYTES) is not None:
        return None
    found = _loaders(esp)
    if not found:
        unified = [one for one in esp.list_folder("/EFI/Linux") or () if one.name.lower().endswith(".efi")]
        if unified:
            found = [(f"/EFI/Linux/{max(one.name for one in unified)}", FALLBACK)]
    if not found:
        return Finding(
            "no-uefi-loader",
            Severity.WARNING,
            subject,
            "Nothing on the EFI system partition starts by itself: the firmware must be told what to start.",
            f"no {FALLBACK}, no shim, no GRUB, no systemd-boot below /EFI",
            "Add a boot entry in the firmware's setup, or run grub-install or bootctl install in the guest.",
        )
    if esp.list_folder("/EFI/BOOT") is None:
        esp.make_folder("/EFI/BOOT")
    for source, target in found:
        content = esp.read_file(source, largest_bytes=LARGEST_PROGRAM_BYTES)
        if content is not None and esp.read_file(target, largest_bytes=LARGEST_PROGRAM_BYTES) is None:
            with overlay.because(f"{target} on {subject}", "what UEFI starts while its boot entries are missing"):
                esp.create_file(target, content)
    return None


def _loaders(esp: FatFileSystem) -> list[tuple[str, str]]:
    """Return (source, target) of what to copy, the program that is started first."""
    for folder in esp.list_folder("/EFI") or ():
        if folder.kind != "folder" or folder.name.upper() == "BOOT":
            continue
        names = {one.name.lower(): one.name for one in esp.list_folder(f"/EFI/{folder.name}") or ()}
        shim = next((names[one] for one in _SHIMS if one in names), None)
        if shim is not None and "grubx64.efi" in names:
            beside = [names[one] for one in _BESIDE_SHIM if one in names]
            return [
                (f"/EFI/{folder.name}/{shim}", FALLBACK),
                *((f"/EFI/{folder.name}/{one}", f"/EFI/BOOT/{one}") for one in beside),
            ]
        loader = next((names[one] for one in _LOADERS if one in names), None)
        if loader is not None:
            return [(f"/EFI/{folder.name}/{loader}", FALLBACK)]
    return []
