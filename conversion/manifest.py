"""What a conversion did to a disk, kept outside it: all that the way back needs (docs/conversion.md, "Manifest").

A conversion is made of components (the boot core, files on the EFI system partition, the registry hive, the guest's
configuration files, the partition table), written in that order. Of each the manifest keeps what stood there before
and what was written, so that whatever the guest left alone goes back byte for byte, and a document by which its
component can find its way where the guest did not.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

from conversion.device import BlockDevice
from conversion.errors import DamagedError, UnsupportedError

MAGIC: Final = b"GDWTCONV"
VERSION: Final = 1
LARGEST_DOCUMENT_BYTES: Final = 16 << 20
LARGEST_CONTENT_BYTES: Final = 256 << 20

# magic, version, length of the document, of the packed content, SHA-256 of both
_HEADER = struct.Struct("<8sIIQ32s")
assert _HEADER.size == 56

System: TypeAlias = Literal["linux", "windows"]
Json: TypeAlias = Mapping[str, Any]  # as json.loads gives it


@dataclass(frozen=True, slots=True)
class Written:
    """A range of the disk: what stood there and what stands there since. Both are equally long."""

    offset: int
    before: bytes
    after: bytes

    @property
    def end(self) -> int:
        """Where the range ends, bytes."""
        return self.offset + len(self.after)


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a conversion. ``document`` is for the module that made it; ranges are sorted and do not touch."""

    name: str
    document: Json
    ranges: tuple[Written, ...]

    def stands(self, device: BlockDevice) -> bool:
        """Whether the device still holds every byte of what was written."""
        return all(
            one.end <= device.size and device.read_at(one.offset, len(one.after)) == one.after for one in self.ranges
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole conversion of a disk of ``size`` bytes from Generation 2 to 1."""

    system: System
    size: int
    sector_size: int
    components: tuple[Component, ...]

    def component(self, name: str) -> Component | None:
        """Return the component of that name, if the conversion had one."""
        return next((one for one in self.components if one.name == name), None)

    def encode(self) -> bytes:
        """Return the file's content. The same conversion gives the same bytes."""
        document = {
            "system": self.system,
            "size": self.size,
            "sector_size": self.sector_size,
            "components": [
                {
                    "name": one.name,
                    "document": one.document,
                    "ranges": [[written.offset, len(written.after)] for written in one.ranges],
                }
                for one in self.components
            ],
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        content = zlib.compress(b"".join(w.before + w.after for one in self.components for w in one.ranges), 6)
        digest = hashlib.sha256(text + content).digest()
        return _HEADER.pack(MAGIC, VERSION, len(text), len(content), digest) + text + content

    @classmethod
    def decode(cls, data: bytes, *, name: str = "the conversion manifest") -> Manifest:
        """Read it back. Raises DamagedError where a single bit is wrong, UnsupportedError for another version."""
        if len(data) < _HEADER.size or data[:8] != MAGIC:
            raise DamagedError(
                "this is no conversion manifest", subject=name, hint="name the file that `godwit convert` wrote"
            )
        _, version, text_length, content_length, digest = _HEADER.unpack_from(data)
        if version != VERSION:
            raise UnsupportedError(
                f"it has version {version}, and this program knows {VERSION}",
                subject=name,
                hint="use the release that wrote it, or a newer one",
            )
        body = data[_HEADER.size :]
        if len(body) != text_length + content_length or hashlib.sha256(body).digest() != digest:
            raise DamagedError(
                "its checksum does not hold", subject=name, hint="take another copy of it: the recovery point keeps one"
            )
        if text_length > LARGEST_DOCUMENT_BYTES:
            raise DamagedError("its document is too long", subject=name)
        try:
            return _decoded(json.loads(body[:text_length]), _unpacked(body[text_length:]))
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RecursionError) as error:
            raise DamagedError(f"it cannot be read: {error}", subject=name) from error


def _unpacked(content: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(content, LARGEST_CONTENT_BYTES)
    if not unpacker.eof:
        raise ValueError("its content is cut off or too long")
    return data


def _decoded(document: Any, content: bytes) -> Manifest:
    system, size, sector_size = document["system"], document["size"], document["sector_size"]
    if system not in ("linux", "windows") or not isinstance(size, int) or not isinstance(sector_size, int):
        raise ValueError("its head contradicts itself")
    components: list[Component] = []
    place = 0
    for one in document["components"]:
        ranges: list[Written] = []
        for offset, length in one["ranges"]:
            if offset < 0 or length <= 0 or offset + length > size or place + 2 * length > len(content):
                raise ValueError("a range reaches outside")
            before, after = content[place : place + length], content[place + length : place + 2 * length]
            ranges.append(Written(offset, before, after))
            place += 2 * length
        if any(left.end > right.offset for left, right in pairwise(ranges)):
            raise ValueError("ranges overlap")
        if not isinstance(one["document"], dict):
            raise ValueError("a component has no document")
        components.append(Component(str(one["name"]), one["document"], tuple(ranges)))
    if place != len(content):
        raise ValueError("it holds more than it names")
    return Manifest(system, size, sector_size, tuple(components))
