"""Where things lie in a Windows guest. Paths as the file systems here take them, from the volume's root."""

from __future__ import annotations

from typing import Final

# On the Windows volume
SYSTEM_HIVE: Final = "/Windows/System32/config/SYSTEM"
SOFTWARE_HIVE: Final = "/Windows/System32/config/SOFTWARE"
DRIVERS_FOLDER: Final = "/Windows/System32/drivers"
LOADER_UEFI: Final = "/Windows/System32/winload.efi"
LOADER_BIOS: Final = "/Windows/System32/winload.exe"
BOOT_MANAGER_BIOS: Final = "/Windows/Boot/PCAT/bootmgr"
MEMORY_TEST_BIOS: Final = "/Windows/Boot/PCAT/memtest.exe"
LANGUAGES_BIOS: Final = "/Windows/Boot/PCAT"  # a folder for each, with bootmgr.exe.mui
FONTS: Final = "/Windows/Boot/Fonts"
HIBERNATION_FILE: Final = "/hiberfil.sys"

# On the EFI system partition
BOOT_STORE_UEFI: Final = "/EFI/Microsoft/Boot/BCD"
BOOT_MANAGER_UEFI: Final = "/EFI/Microsoft/Boot/bootmgfw.efi"
FALLBACK_FOLDER: Final = "/EFI/BOOT"
FALLBACK_UEFI: Final = "/EFI/BOOT/BOOTX64.EFI"

# On the EFI system partition once it starts from a BIOS
BOOT_FOLDER: Final = "/Boot"
BOOT_STORE: Final = "/Boot/BCD"
BOOT_MANAGER: Final = "/bootmgr"
