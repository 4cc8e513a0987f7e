"""The recording file layer of ``crash_files`` with second names, as bringing disks home gives them to old disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.crash_files import CrashPoint, Effect, RecordingFiles, SparseBytes, _choices, _Storage


@dataclass
class RecordingHomeFiles(RecordingFiles):
    """``has_links`` False is a file system without hard links."""

    has_links: bool = True

    def link(self, path: Path, name: Path) -> bool:
        if not self.has_links:
            return False
        with self.effect(Effect("hardlink", self.inodes[path], path, target=name)):
            os.link(path, name)
        self.inodes[name] = self.inodes[path]
        return True

    def remove(self, path: Path) -> None:
        if path.exists() and path not in self.inodes:  # it has this name by a call that failed after the fact
            self.inodes[path] = next(self._numbers)
        super().remove(path)


class _LinkedStorage(_Storage):
    def take(self, effect: Effect) -> None:
        if effect.kind == "hardlink":
            assert effect.target is not None
            self.names[effect.target] = self.names[effect.path]
        else:
            super().take(effect)


@dataclass(frozen=True, slots=True)
class LinkedCrashPoint(CrashPoint):
    """A crash point in which two names may be of one file."""

    def write_to(self, folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        made: dict[int, Path] = {}
        for path, content in self.files.items():
            if id(content) in made:
                os.link(made[id(content)], folder / path.name)
            else:
                content.write_to(folder / path.name)
                made[id(content)] = folder / path.name


def crash_points(record: RecordingHomeFiles, *, seeds: int = 1) -> Iterator[LinkedCrashPoint]:
    """Yield every crash point of the record, as ``crash_files.crash_points`` does."""
    storage = _LinkedStorage(record)
    for ordinal in range(len(record.effects) + 1):
        for mode, survivors in _choices(storage.pending, ordinal, seeds):
            files: dict[Path, SparseBytes] = storage.after(survivors)
            yield LinkedCrashPoint(ordinal, mode, files, ())
        if ordinal < len(record.effects):
            storage.take(record.effects[ordinal])
