"""Checking an image of any format: VHDX by its own rules, VHD and raw here. Nothing is ever changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vhdx import qcow2
from vhdx.check import CheckReport, Findings, Severity, check_disk
from vhdx.errors import CorruptDiskError, DiskError, FormatUnknownError, OsError, UnsupportedDiskError
from vhdx.formats import detect_format
from vhdx.osfile import OS_FILES, Files
from vhdx.vhd import SparseVhdDisk, open_vhd
from vhdx.vhd_layout import Problem, table_problems
from vhdx.vhd_parent import timestamp_problem
from vhdx.vhd_structures import MIB, geometry_for


def check_image(
    path: Path | str, *, allowed_folders: Sequence[Path | str] = (), files: Files = OS_FILES
) -> CheckReport:
    """Check an image and the link to its parent; parents themselves are not checked.

    What is wrong with the image is a finding. Raises OsError where it cannot be read, and FormatUnknownError or
    UnsupportedDiskError where it is no image of a format that can be checked.
    """
    path = Path(path)
    try:
        known = detect_format(path, files=files)
    except CorruptDiskError as error:
        findings = Findings()
        findings.add_error("identifier", error)
        return CheckReport(path, findings.finish())
    if known == "vhdx":
        return check_disk(path, allowed_folders=allowed_folders, files=files)
    findings = Findings()
    if known == "vhd":
        _check_vhd(path, allowed_folders, files, findings)
    elif known == "qcow2":
        qcow2.virtual_size(path, files=files)
        findings.add(
            "qcow2", Severity.INFO, "only the header of a qcow2 is looked at; qemu-img check looks at the rest", 0
        )
    else:
        findings.add("raw", Severity.INFO, "a raw image has no structures that could be wrong")
    return CheckReport(path, findings.finish())


def _check_vhd(path: Path, allowed_folders: Sequence[Path | str], files: Files, findings: Findings) -> None:
    try:
        disk = open_vhd(path, allowed_folders=allowed_folders, files=files)
    except (OsError, FormatUnknownError):
        raise
    except UnsupportedDiskError as error:
        findings.add_error("unsupported", error)
        return
    except DiskError as error:
        findings.add_error("structures", error)
        return
    with disk:
        layout = disk.layout
        _add(findings, "footer", layout.problems)
        _add(findings, "bat", table_problems(layout))
        if disk.footer.geometry != geometry_for(disk.size):
            message = (
                f"the geometry {disk.footer.geometry} is not the one that the size gives; it matters to old guests"
            )
            findings.add("geometry", Severity.INFO, message, layout.content_end + 56)
        if layout.header is None and disk.size % MIB:
            message = f"the size of {disk.size} bytes is no multiple of 1 MiB: Azure refuses such a disk"
            findings.add("azure-size", Severity.INFO, message, layout.content_end + 48)
        if isinstance(disk, SparseVhdDisk) and disk.parent_error is not None:
            findings.add("parent-missing", Severity.WARNING, disk.parent_error.message)
        elif isinstance(disk, SparseVhdDisk) and disk.parent is not None:
            problem = timestamp_problem(layout, disk.parent)
            _add(findings, "parent-time", [problem] if problem else [])


def _add(findings: Findings, rule: str, problems: Sequence[Problem]) -> None:
    for problem in problems:
        findings.add(rule, Severity(problem.severity), problem.message, problem.offset)
