"""What Hyper-V's configuration files say of disk files: which of them a machine or a configured checkpoint names.

Hyper-V keeps a configuration (.vmcx; .xml on old hosts) of each machine and of each checkpoint, and in it the paths of
the disks' files, as UTF-16. A checkpoint names the files as they were when it was made: those beneath its own. If such
a file is merged or written to behind Hyper-V's back, the checkpoint leads to nothing, or to other content. Nothing of
these files is decoded: whether a file's name stands in them is all that is asked, so that a doubt is never overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIGURATIONS: Final = (".vmcx", ".xml")
FOLDERS: Final = ("Virtual Machines", "Snapshots")
MOST_FILES: Final = 5000
MOST_BYTES: Final = 32 << 20  # of one configuration; usual ones have some 100 KiB


@dataclass(frozen=True, slots=True)
class Records:
    """The configurations that were found, those that could not be read, and which name which file."""

    configurations: tuple[Path, ...]
    unreadable: tuple[Path, ...]
    naming: dict[Path, tuple[Path, ...]]  # by disk file


def read_records(paths: Sequence[Path], folders: Sequence[Path] = ()) -> Records:
    """Look for the names of disk files in the configurations beside them, in the usual places, and in ``folders``.

    Beside them is: in their folder and the one above, and in both's ``Virtual Machines`` and ``Snapshots``. In
    ``folders``, also beneath them. Never raises: what cannot be read is told.
    """
    found: list[Path] = []
    unreadable: list[Path] = []
    naming: dict[Path, list[Path]] = {path: [] for path in paths}
    for configuration in _configurations(paths, folders):
        try:
            with configuration.open("rb") as file:
                content = file.read(MOST_BYTES + 1).lower()
        except OSError:
            content = None
        if content is not None and configuration.suffix.lower() == ".xml" and not _is_hyperv(content):
            continue
        found.append(configuration)
        if content is None or len(content) > MOST_BYTES:
            unreadable.append(configuration)
            continue
        for path, named_by in naming.items():
            if any(form in content for form in _forms(path.name)):
                named_by.append(configuration)
    return Records(tuple(found), tuple(unreadable), {path: tuple(by) for path, by in naming.items() if by})


def _is_hyperv(content: bytes) -> bool:
    """Whether an XML file is of the kind in which old hosts keep machines."""
    return any("<configuration".encode(code) in content for code in ("utf-8", "utf-16-le"))


def _forms(name: str) -> Iterator[bytes]:
    """Yield how a configuration may spell the end of a path with that name, in lower case."""
    for separator in ("\\", "/"):
        yield (separator + name).encode("utf-16-le", "surrogatepass").lower()
        yield (separator + name).encode("utf-8", "surrogateescape").lower()


def _configurations(paths: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    near: list[Path] = []
    for folder in dict.fromkeys(path.absolute().parent for path in paths):
        for one in (folder, folder.parent):
            near += [one, *(one / name for name in FOLDERS)]
    found: dict[Path, None] = {}
    for listing in (*(_listed(one) for one in dict.fromkeys(near)), *(_beneath(one) for one in folders)):
        for path in listing:
            if len(found) >= MOST_FILES:
                return list(found)
            if path.suffix.lower() in CONFIGURATIONS:
                found[path.resolve()] = None
    return list(found)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())
    except OSError:
        return []


def _beneath(folder: Path) -> Iterator[Path]:
    waiting = [folder]
    while waiting:
        one = waiting.pop(0)
        try:
            entries = sorted(one.iterdir())
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir() and not entry.is_symlink():
                    waiting.append(entry)
                elif entry.is_file():
                    yield entry
            except OSError:
                continue
