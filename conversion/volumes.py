"""What lies between partitions and file systems: LVM logical volumes and mdraid mirrors as devices, LUKS as a fact.

LVM: the label and the metadata area of each physical volume, and in it the newest text metadata, in which the logical
volumes are lists of segments. Linear and striped segments are read; a volume of anything else is named with what it
needs. mdraid: a member of a mirror holds all data, from an offset on. Layouts: lvm2's format_text, the kernel's md_p.h.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from conversion.device import BlockDevice, Slice
from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.probe import probe
from conversion.lvm_text import Value, parse_metadata, section

SECTOR: Final = 512
LARGEST_METADATA_BYTES: Final = 16 << 20
LARGEST_LUKS_JSON_BYTES: Final = 4 << 20
MOST_SEGMENTS: Final = 1 << 16
_MDA_MAGIC: Final = b"\x20LVM2\x20x[5A%r0N*>"
_RAID_MAGIC: Final = b"\xfc\x4e\x2b\xa9"
_TPM_WORDS: Final = re.compile(r"tpm2?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a logical volume on one device; ``stripes`` more than one take turns, chunk by chunk."""

    start: int  # in the volume, bytes
    length: int
    stripe_size: int  # bytes; 0 for one device
    stripes: tuple[tuple[BlockDevice, int], ...]  # device and where the data begin on it


class MappedDevice:
    """A read-only device put together from pieces of others."""

    def __init__(self, pieces: Sequence[_Piece], sector_size: int) -> None:
        """``pieces`` are ascending and leave no gap."""
        self._pieces = tuple(pieces)
        self._size = pieces[-1].start + pieces[-1].length if pieces else 0
        self._sector_size = sector_size

    @property
    def size(self) -> int:
        """Length, bytes."""
        return self._size

    @property
    def sector_size(self) -> int:
        """Logical sector size, bytes."""
        return self._sector_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``. Raises ValueError outside the device."""
        return b"".join(device.read_at(at, count) for device, at, count in self.places(offset, length))

    def places(self, offset: int, length: int) -> list[tuple[BlockDevice, int, int]]:
        """Return where bytes lie below, as (device, offset, length). Raises ValueError outside the device."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"{length} bytes at {offset} reach outside a volume of {self._size} bytes")
        found = []
        for piece in self._pieces:
            first, end = max(offset, piece.start), min(offset + length, piece.start + piece.length)
            while first < end:
                within = first - piece.start
                if not piece.stripe_size:
                    device, start = piece.stripes[0]
                    count = end - first
                else:
                    turn, inside = divmod(within, piece.stripe_size)
                    row, column = divmod(turn, len(piece.stripes))
                    device, start = piece.stripes[column]
                    count = min(end - first, piece.stripe_size - inside)
                    within = row * piece.stripe_size + inside
                found.append((device, start + within, count))
                first += count
        return found


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """``device`` is None where ``trouble`` says what it would need."""

    group: str
    name: str
    uuid: str
    group_uuid: str
    device: MappedDevice | None
    trouble: str = ""

    @property
    def mapper_name(self) -> str:
        """What the volume is called below /dev/mapper: hyphens inside of names are doubled."""
        return f"{self.group.replace('-', '--')}-{self.name.replace('-', '--')}"


@dataclass(frozen=True, slots=True)
class RaidMember:
    """A member of an mdraid array. ``device`` is the data of a mirror; None where ``trouble`` says why not."""

    uuid: str  # as mdadm writes it, without colons: 32 hexadecimal digits
    name: str
    level: int
    version: str
    device: Slice | None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """An encrypted volume. ``tokens`` are the kinds of what can open it beside passphrases (LUKS2)."""

    version: int
    uuid: str
    label: str
    tokens: tuple[str, ...]
    needs_tpm: bool  # a token is bound to a TPM


def read_lvm(devices: Sequence[BlockDevice]) -> tuple[LogicalVolume, ...]:
    """Return the logical volumes whose physical volumes are among ``devices``, by group and name.

    Devices that are no physical volumes are passed over. Raises DamagedError where a group's metadata contradict
    themselves.
    """
    members: dict[str, BlockDevice] = {}
    groups: dict[str, tuple[int, str, dict[str, Value]]] = {}  # by UUID: sequence number, name, content
    for device in devices:
        label = _read_label(device)
        if label is None:
            continue
        members[label.uuid] = device
        for offset, size in label.metadata_areas:
            found = _read_metadata(device, offset, size)
            if found is not None:
                sequence, name, content = found
                identity = _text(content, "id")
                if identity not in groups or groups[identity][0] < sequence:
                    groups[identity] = (sequence, name, content)
    volumes: list[LogicalVolume] = []
    for identity, (_, name, content) in groups.items():
        volumes += _volumes(name, identity, content, members)
    return tuple(sorted(volumes, key=lambda volume: (volume.group, volume.name)))


@dataclass(frozen=True, slots=True)
class _Label:
    uuid: str  # without hyphens
    metadata_areas: tuple[tuple[int, int], ...]


def _read_label(device: BlockDevice) -> _Label | None:
    head = device.read_at(0, min(4 * SECTOR, device.size))
    for start in range(0, len(head) - SECTOR + 1, SECTOR):
        sector = head[start : start + SECTOR]
        if sector[:8] != b"LABELONE" or sector[24:32] != b"LVM2 001":
            continue
        at = int.from_bytes(sector[20:24], "little")
        areas: list[list[tuple[int, int]]] = [[], []]  # of data, of metadata: two lists, each ended by zeros
        reading, at_list = at + 40, 0
        while reading + 16 <= SECTOR and at_list < 2:
            offset, size = struct.unpack_from("<QQ", sector, reading)
            reading += 16
            if offset == 0:
                at_list += 1
            else:
                areas[at_list].append((offset, size))
        return _Label(sector[at : at + 32].decode("ascii", "replace"), tuple(areas[1]))
    return None


def _read_metadata(device: BlockDevice, offset: int, size: int) -> tuple[int, str, dict[str, Value]] | None:
    """Return sequence number, group name and content of the newest metadata in an area; None where it has none."""
    if offset + SECTOR > device.size or not SECTOR < size <= device.size - offset:
        raise DamagedError("its metadata area reaches outside of it", subject="the LVM physical volume")
    header = device.read_at(offset, SECTOR)
    if header[4:20] != _MDA_MAGIC:
        raise DamagedError("its metadata area has no header", subject="the LVM physical volume")
    start, length, checksum, flags = struct.unpack_from("<QQII", header, 40)
    if start == 0 or flags & 1:
        return None
    if not SECTOR <= start < size or not 0 < length <= min(LARGEST_METADATA_BYTES, size - SECTOR):
        raise DamagedError("its metadata lie outside of their area", subject="the LVM physical volume")
    first = min(length, size - start)
    text = device.read_at(offset + start, first)
    text += device.read_at(offset + SECTOR, length - first)  # the area is a ring behind its header
    if _lvm_crc(text) != checksum:
        raise DamagedError("its metadata fail their checksum", subject="the LVM physical volume")
    content = parse_metadata(text)
    for name, value in content.items():
        if isinstance(value, dict) and "seqno" in value:
            return _number(value, "seqno"), name, value
    raise DamagedError("its metadata describe no volume group", subject="the LVM physical volume")


def _lvm_crc(data: bytes) -> int:
    """Return the CRC-32 of zlib's polynomial with LVM's first value and no last inversion."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _volumes(
    group: str, identity: str, content: dict[str, Value], members: dict[str, BlockDevice]
) -> list[LogicalVolume]:
    extent = _number(content, "extent_size") * SECTOR
    places: dict[str, tuple[BlockDevice, int]] = {}
    for name, described in section(content, "physical_volumes").items():
        device = members.get(_text(described, "id").replace("-", "")) if isinstance(described, dict) else None
        if device is not None and isinstance(described, dict):
            places[name] = device, _number(described, "pe_start") * SECTOR
    found = []
    for name, described in section(content, "logical_volumes").items():
        if not isinstance(described, dict):
            continue
        mapped, trouble = None, ""
        try:
            mapped = _mapped(described, extent, places)
        except ConversionError as error:
            trouble = error.message
        found.append(LogicalVolume(group, name, _text(described, "id"), identity, mapped, trouble))
    return found


def _mapped(described: dict[str, Value], extent: int, places: dict[str, tuple[BlockDevice, int]]) -> MappedDevice:
    count = _number(described, "segment_count")
    if not 0 < count <= MOST_SEGMENTS:
        raise DamagedError(f"a logical volume has {count} segments", subject="LVM")
    pieces, reached = list[_Piece](), 0
    for number in range(1, count + 1):
        segment = section(described, f"segment{number}")
        if _text(segment, "type") != "striped":
            raise UnsupportedError(f"it is of the type {_text(segment, 'type')}", subject="LVM")
        start, length = _number(segment, "start_extent") * extent, _number(segment, "extent_count") * extent
        stripes = _stripes(segment, extent, places)
        stripe_size = _number(segment, "stripe_size") * SECTOR if len(stripes) > 1 else 0
        each = length // max(1, len(stripes))
        beyond = any(at + each > device.size for device, at in stripes)
        if start != reached or not length or beyond or (len(stripes) > 1 and not stripe_size):
            raise DamagedError("the segments of a logical volume contradict themselves", subject="LVM")
        pieces.append(_Piece(start, length, stripe_size, stripes))
        reached = start + length
    return MappedDevice(pieces, max(device.sector_size for piece in pieces for device, _ in piece.stripes))


def _stripes(
    segment: dict[str, Value], extent: int, places: dict[str, tuple[BlockDevice, int]]
) -> tuple[tuple[BlockDevice, int], ...]:
    listed = segment.get("stripes")
    count = _number(segment, "stripe_count")
    if not isinstance(listed, list) or len(listed) != 2 * count or not 0 < count <= 128:
        raise DamagedError("the stripes of a logical volume contradict themselves", subject="LVM")
    found = []
    for name, first in zip(listed[::2], listed[1::2], strict=True):
        if not isinstance(name, str) or not isinstance(first, int) or first < 0:
            raise DamagedError("the stripes of a logical volume contradict themselves", subject="LVM")
        if name not in places:
            raise UnsupportedError(
                f"it reaches over the physical volume {name}, which is not on this disk", subject="LVM"
            )
        device, start = places[name]
        found.append((device, start + first * extent))
    return tuple(found)


def _number(content: dict[str, Value], key: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise DamagedError(f"the metadata have no number {key}", subject="LVM")
    return value


def _text(content: dict[str, Value], key: str) -> str:
    value = content.get(key)
    if not isinstance(value, str):
        raise DamagedError(f"the metadata have no text {key}", subject="LVM")
    return value


def read_raid_member(device: BlockDevice) -> RaidMember | None:
    """Return what array ``device`` is a member of; None where it is none. Raises DamagedError."""
    probed = probe(device)
    if probed.kind != "linux_raid_member":
        return None
    uuid = probed.uuid.replace("-", "")
    if probed.detail == "0.90":
        at = (device.size & ~0xFFFF) - 65536
        words = struct.unpack("<32I", device.read_at(at, 128))
        return _member(device, uuid, "", words[7], "0.90", 0, words[8] * 1024)
    at = {"1.1": 0, "1.2": 4096}.get(probed.detail, ((device.size >> 9) - 16 & ~7) << 9)
    block = device.read_at(at, 256)
    level = int.from_bytes(block[72:76], "little", signed=True)
    size, offset = int.from_bytes(block[80:88], "little"), int.from_bytes(block[128:136], "little")
    return _member(device, uuid, probed.label, level, probed.detail, offset * SECTOR, size * SECTOR)


def _member(device: BlockDevice, uuid: str, name: str, level: int, version: str, start: int, size: int) -> RaidMember:
    if level & 0xFFFFFFFF != 1:
        return RaidMember(uuid, name, level, version, None, f"it is of level {level}, not a mirror")
    if not size or start + size > device.size:
        raise DamagedError("its data reach outside of it", subject="the mdraid member")
    return RaidMember(uuid, name, level, version, Slice(device, start, size))


def read_luks(device: BlockDevice) -> LuksHeader | None:
    """Return what encrypts ``device``; None where nothing does, as far as a header tells. Never raises on damage."""
    probed = probe(device)
    if probed.kind != "crypto_LUKS":
        return None
    head = device.read_at(0, 16)
    version = int.from_bytes(head[6:8], "big")
    tokens = _luks_tokens(device, int.from_bytes(head[8:16], "big")) if version == 2 else ()
    return LuksHeader(version, probed.uuid, probed.label, tuple(kind for kind, _ in tokens), any(t for _, t in tokens))


def _luks_tokens(device: BlockDevice, header_size: int) -> tuple[tuple[str, bool], ...]:
    """Return the kinds of the tokens, and whether each is bound to a TPM."""
    end = min(header_size, LARGEST_LUKS_JSON_BYTES, device.size)
    raw = device.read_at(4096, max(0, end - 4096)).split(b"\0", 1)[0]
    try:
        tokens = json.loads(raw).get("tokens", {}).values()
        kinds = [(str(token.get("type", "")), token) for token in tokens]
    except (ValueError, AttributeError, RecursionError):
        return ()
    # clevis keeps what it needs in a JSON Web Encryption whose protected header is base64url, so its pin is decoded.
    return tuple(
        (kind, bool(_TPM_WORDS.search(kind)) or (kind == "clevis" and _is_bound_to_tpm(token))) for kind, token in kinds
    )


def _is_bound_to_tpm(token: dict[str, object]) -> bool:
    jwe = token.get("jwe")
    protected = jwe.get("protected") if isinstance(jwe, dict) else None
    if not isinstance(protected, str):
        return True  # what cannot be told is taken for the worse
    try:
        header = base64.urlsafe_b64decode(protected + "=" * (-len(protected) % 4))
    except ValueError:
        return True
    # Shamir's scheme (pin sss) nests further encryptions, of which any may be a TPM's.
    return b'"tpm2"' in header or b'"sss"' in header
