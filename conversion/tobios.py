"""Planning Generation 2 to 1: from GPT and UEFI to a master boot record and a BIOS, in an overlay over the disk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from conversion import grub
from conversion.bootguests import Entry, Place, WindowsGuest
from conversion.bootscript import BootScript, boot_script
from conversion.device import BlockDevice
from conversion.errors import ConversionError, RefusedError, ToolError
from conversion.filesystems.fat import FatFileSystem
from conversion.finding import Finding, Severity
from conversion.inspection import Inspection, inspect, opened, windows_volumes
from conversion.layout import Layout, write_places, write_switch
from conversion.layout_planner import PlannedLayout, plan_layout
from conversion.linux.bootguest import boot_guest, needs_unified
from conversion.linux.system import LinuxSystem, UnifiedKernel
from conversion.manifest import Manifest
from conversion.overlay import Overlay
from conversion.partition_types import System
from conversion.plan import ESP, GUEST, PLACES, SWITCH, TO_BIOS_ORDER, Plan, components
from conversion.saved_table import save_table
from conversion.uki import split_unified_image
from conversion.windows.convert import convert_esp, convert_system, forget_hibernation
from conversion.windows.hivetrace import trace_of

LARGEST_UNIFIED_BYTES: Final = 128 << 20
UNIFIED_FOLDER: Final = "/EFI/godwit"


def plan_bios(
    device: BlockDevice,
    *,
    discard_hibernation: bool = False,
    largest_sectors: int | None = None,
    modules: Path = grub.DIRECTORY,
) -> Plan:
    """Plan the conversion of a disk of Generation 2. Nothing is written but into the plan's overlay.

    ``largest_sectors`` is what the target can hold (``layout_planner.LARGEST_FIXED_VHD_SECTORS`` for Azure). The same
    disk gives the same plan. A disk that cannot be converted gives a plan that is refused, with the reasons; raises
    ToolError where GRUB is missing, and what the device raises.
    """
    overlay = Overlay(device)
    found = inspect(overlay, discard_hibernation=discard_hibernation)
    if not found.is_convertible:
        return Plan(1, found, None, TO_BIOS_ORDER, found.findings)
    planner = _Planner(overlay, found, largest_sectors, discard_hibernation, modules)
    try:
        return planner.run()
    except ToolError:
        raise  # nothing is wrong with the disk
    except ConversionError as error:
        findings = planner.refusals or (
            Finding(
                *("refused", Severity.REFUSAL, error.subject or "disk", f"It cannot be converted: {error.message}."),
                *("found while planning", error.hint or ""),
            ),
        )
        return Plan(1, found, None, TO_BIOS_ORDER, (*found.findings, *findings))


class _Planner:
    """One conversion being planned."""

    def __init__(
        self, overlay: Overlay, found: Inspection, largest_sectors: int | None, discard_hibernation: bool, modules: Path
    ) -> None:
        assert found.copies is not None and found.esp is not None and found.system is not None
        self._overlay = overlay
        self._found = found
        self._copies = found.copies
        self._esp = found.esp
        self._system: System = found.system
        self._largest_sectors = largest_sectors
        self._discard_hibernation = discard_hibernation
        self._modules = modules
        self._sentences: list[str] = []
        self._findings: list[Finding] = []
        self._documents: dict[str, dict[str, Any]] = {}
        self.refusals: tuple[Finding, ...] = ()  # of the layout, where there is none

    def run(self) -> Plan:
        unified = self._take_unified_apart()
        planned, core = self._fit_core(unified)
        layout = planned.require()
        self._findings += planned.findings
        code = grub.boot_code(layout.core_lba, directory=self._modules)
        placed = grub.place_core(core, layout.core_lba)
        saved = save_table(self._overlay.below, self._copies, layout, system=self._system, boot_code=code, core=placed)
        self._documents[SWITCH] = saved.document()
        with self._overlay.component(PLACES), self._overlay.because("boot core", "the BIOS starts the system by it"):
            write_places(self._overlay, layout, core=placed)
        if self._found.windows is not None:
            self._convert_windows(layout)
        if self._found.linux is not None:
            self._edit_linux(self._found.linux)
        with (
            self._overlay.component(SWITCH),
            self._overlay.because("master boot record", "a BIOS reads it; the GUID partition table sleeps beneath"),
        ):
            write_switch(self._overlay, layout, boot_code=code)
        manifest = Manifest(
            self._system,
            self._overlay.size,
            self._overlay.sector_size,
            components(self._overlay, TO_BIOS_ORDER, self._documents),
        )
        return Plan(
            1,
            self._found,
            self._overlay,
            TO_BIOS_ORDER,
            (*self._found.findings, *self._findings),
            tuple(self._sentences),
            layout,
            manifest,
        )

    def _fit_core(self, unified: tuple[Entry, ...]) -> tuple[PlannedLayout, bytes]:
        """Plan the layout and build the core. Each asks for the other: the core names partitions, and takes room."""
        sectors, core = 1, b""
        for _ in range(4):
            planned = plan_layout(
                self._copies.table,
                sectors=self._copies.sectors,
                sector_size=self._overlay.sector_size,
                system=self._system,
                boot_partition=self._esp.number,
                core_sectors=sectors,
                largest_sectors=self._largest_sectors,
            )
            if planned.layout is None:
                self.refusals = planned.findings
            layout = planned.require()
            script = self._script(layout, unified)
            core = grub.build_core(
                script.configuration, script.modules, late_modules=script.late_modules, directory=self._modules
            )
            if grub.core_sectors(core) == sectors:
                return planned, core
            sectors = grub.core_sectors(core)
        raise ConversionError("the boot core and its place on the disk do not come to fit")

    def _script(self, layout: Layout, unified: tuple[Entry, ...]) -> BootScript:
        def number_of(gpt_number: int) -> int | None:
            entry = layout.entry(gpt_number)
            return None if entry is None else entry.number

        if self._found.linux is not None:
            places = tuple(replace(one, place=_located(one.place, number_of(self._esp.number))) for one in unified)
            try:
                return boot_script(boot_guest(self._found.linux, number_of, places, signature=layout.signature))
            except ValueError as error:
                hint = "give what starts the system a plain name"
                raise RefusedError(f"what starts the system cannot be written down: {error}", hint=hint) from error
        esp = opened(self._esp.device)
        return boot_script(WindowsGuest(number_of(self._esp.number), (esp.uuid or None) if esp is not None else None))

    def _convert_windows(self, layout: Layout) -> None:
        inspected = self._found.windows
        assert inspected is not None and inspected.windows is not None
        by_number = {one.number: one for one in windows_volumes(self._found.partitions)}
        esp, windows = by_number[self._esp.number], by_number[inspected.windows.number]
        identity = layout.identity()
        trace = trace_of(windows)
        with self._overlay.component(ESP):
            files = convert_esp(esp, windows, identity, overlay=self._overlay)
        with self._overlay.component(GUEST):
            hive = convert_system(
                windows,
                identity,
                overlay=self._overlay,
                letterless=inspected.letterless,
                recovery=inspected.system_hive,
            )
            if self._discard_hibernation:
                forget_hibernation(windows, overlay=self._overlay)
        self._documents[ESP] = {"windows": files.document(), "partition": self._esp.number}
        self._documents[GUEST] = {"windows": hive.document(), "partition": windows.number, "trace": trace}
        self._findings += (*files.findings, *hive.findings)

    def _edit_linux(self, linux: LinuxSystem) -> None:
        with self._overlay.component(GUEST):
            for edit in linux.edits:
                with self._overlay.because(f"{edit.path} on {edit.volume.subject}", edit.why):
                    done = 0
                    for device, offset, length in edit.places:
                        device.write_at(offset, edit.new[done : done + length])  # type: ignore[attr-defined]
                        done += length
        self._documents[GUEST] = {
            "linux": [
                {
                    "path": edit.path,
                    "line": edit.line,
                    "offset": edit.offset,
                    "old": edit.old.hex(),
                    "new": edit.new.hex(),
                }
                for edit in linux.edits
            ]
        }

    def _take_unified_apart(self) -> tuple[Entry, ...]:
        """Put kernels out of unified images onto the ESP, where a unified image is all that there is."""
        linux = self._found.linux
        if linux is None or not needs_unified(linux):
            return ()
        esp = opened(self._esp.device)
        if not isinstance(esp, FatFileSystem):
            raise RefusedError("the EFI system partition is no FAT", subject=f"partition {self._esp.number}")
        entries = []
        with self._overlay.component(ESP):
            newest = sorted(linux.unified_kernels, key=lambda one: one.version, reverse=True)[:2]
            for number, one in enumerate(newest):
                entries.append(self._extract(esp, one, number))
        self._sentences.append(
            "Kernels were taken out of unified images: ones that are installed later start only as Generation 2."
        )
        return tuple(entries)

    def _extract(self, esp: FatFileSystem, unified: UnifiedKernel, number: int) -> Entry:
        assert unified.volume.file_system is not None
        content = unified.volume.file_system.read_file(unified.path, largest_bytes=LARGEST_UNIFIED_BYTES)
        if content is None:
            raise RefusedError("the unified kernel image cannot be read", subject=unified.path)
        image = split_unified_image(content, subject=unified.path)
        why = f"a BIOS cannot start {unified.path} itself"
        if esp.list_folder(UNIFIED_FOLDER) is None:
            with self._overlay.because(f"{UNIFIED_FOLDER} on partition {self._esp.number}", why):
                esp.make_folder(UNIFIED_FOLDER)
            self._documents[ESP] = {"added": [], "folder": UNIFIED_FOLDER}
        files = [(f"{UNIFIED_FOLDER}/linux{number}", image.kernel)]
        files += [(f"{UNIFIED_FOLDER}/initrd{number}-{index}", data) for index, data in enumerate(image.initrds)]
        added = self._documents.setdefault(ESP, {"added": []})["added"]
        for path, data in files:
            with self._overlay.because(f"{path} on partition {self._esp.number}", why):
                esp.create_file(path, data, overwrite=True)
            added.append({"path": path, "sha256": hashlib.sha256(data).hexdigest()})
        initrds = tuple(path for path, _ in files[1:])
        return Entry(image.title, Place(esp.uuid), files[0][0], initrds, image.command_line)


def _located(place: Place, number: int | None) -> Place:
    return Place(place.file_system_uuid, number)
