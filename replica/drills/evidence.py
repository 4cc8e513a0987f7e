"""Evidence of a drill: a document that is signed, the page and the picture that go with it, and their verification.

The document is JSON in one form only: what differs from that form in any byte is refused, whatever it means.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, Final

from replica import record
from replica.drills.drill import Drill
from replica.drills.page import page, plan_page
from replica.errors import FormatVersionError, GodwitError, IntegrityError, UsageError
from replica.failover.means import Means
from replica.host import Host
from replica.signing import KEY_BYTES, SIGNATURE_BYTES, SigningKey, fingerprint, is_signed
from vhdx.temporary import temporary_path

FORMAT: Final = "godwit drill evidence"
VERSION: Final = 1
PLAN_VERSION: Final = 2  # of the drill of a plan, which earlier versions do not know
LARGEST_BYTES: Final = 8 << 20
LARGEST_FILE_BYTES: Final = 64 << 20

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Written:
    """Evidence as it lies in files. ``sha256`` is that of the document."""

    document: Path
    page: Path
    picture: Path | None
    sha256: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Verified:
    """Evidence that is what its signer wrote. ``missing`` are files it names that are not beside it."""

    body: Mapping[str, Any]
    fingerprint: str
    files: tuple[str, ...]
    missing: tuple[str, ...]


def prepare(folder: Path) -> None:
    """Make the folder, before anything is begun that could not be told then. Raises GodwitError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise GodwitError(
            f"no evidence can be written there: {error.strerror}", path=str(folder), hint="choose another --evidence"
        ) from error


def write(folder: Path, means: Means, drill: Drill, key: SigningKey) -> Written:
    """Write the evidence of a drill: picture and page first, then the document that names their hashes.

    Raises GodwitError where the folder cannot be written.
    """
    body = body_of(means, drill)
    name = _UNSAFE.sub("-", means.name).strip("-")[:60] or "vm"
    stem = f"drill-{name}-{drill.begun_at:%Y%m%dT%H%M%SZ}-{means.host.randomness.new_id()[:8]}"
    files: list[tuple[str, Path, bytes]] = []
    if drill.picture is not None:
        files.append(("picture", folder / f"{stem}.png", drill.picture))
    shown = page(body, drill.picture, key.fingerprint, f"{stem}.json")
    files.append(("page", folder / f"{stem}.html", shown.encode("utf-8", "backslashreplace")))
    for _, path, content in files:
        _write_whole(path, content)
    body["files"] = [
        {"what": what, "name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for what, path, content in files
    ]
    document = folder / f"{stem}.json"
    content = signed(body, key)
    _write_whole(document, content)
    paths = {what: path for what, path, _ in files}
    return Written(document, paths["page"], paths.get("picture"), hashlib.sha256(content).hexdigest(), key.fingerprint)


def write_plan(
    folder: Path, host: Host, name: str, body: dict[str, Any], pictures: Mapping[str, bytes], key: SigningKey
) -> Written:
    """Write the evidence of the drill of a plan: ``pictures`` by VM, the page, then the document that names them.

    Raises GodwitError where the folder cannot be written.
    """
    stem = f"drill-plan-{name}-{host.clock.now():%Y%m%dT%H%M%SZ}-{host.randomness.new_id()[:8]}"
    files = [
        (f"picture of {vm}", folder / f"{stem}-{number}.png", held)
        for number, (vm, held) in enumerate(pictures.items(), start=1)
    ]
    shown = plan_page(body, pictures, key.fingerprint, f"{stem}.json")
    files.append(("page", folder / f"{stem}.html", shown.encode("utf-8", "backslashreplace")))
    for _, path, content in files:
        _write_whole(path, content)
    body["files"] = [
        {"what": what, "name": path.name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for what, path, content in files
    ]
    document = folder / f"{stem}.json"
    content = signed(body, key, version=PLAN_VERSION)
    _write_whole(document, content)
    return Written(document, files[-1][1], None, hashlib.sha256(content).hexdigest(), key.fingerprint)


def body_of(means: Means, drill: Drill) -> dict[str, Any]:
    """Return what the document says, but for the files beside it."""
    machine, point = drill.machine, drill.point
    return {
        "vm": {"name": means.name, "id": means.found.vm.vm_id},
        "host": {"name": means.host.host_name, "id": means.host.host_id},
        "store": means.store.url,
        "made_by": made_by(),
        "verdict": "passed" if drill.passed else "failed",
        "reasons": list(drill.reasons),
        "begun_at": record.time_text(drill.begun_at),
        "ended_at": record.time_text(drill.ended_at),
        "rto_seconds": drill.rto_seconds,
        "phases": [{"name": one.phase.value, "seconds": one.seconds} for one in drill.timings],
        "wanted_point": drill.wanted_point,
        "point": None
        if point is None
        else {
            "number": point.point,
            "created_at": record.time_text(point.created_at),
            "published_at": record.time_text(point.published_at),
            "age_seconds": round((drill.begun_at - point.created_at).total_seconds(), 3),
            "consistency": point.consistency.value,
            "manifest": means.found.keys.manifest(point.point),
            "manifest_sha256": _manifest_digest(means, point.point),
            "maps": [
                {"level": one.level, "entries": one.entries, "digest": _digest(part.checksum for part in one.parts)}
                for one in point.maps
            ],
            "disks": [
                {"number": one.number, "name": one.name, "bytes": one.size, "digest": str(one.digest)}
                for one in point.disks
            ],
        },
        "passed_over": [asdict(one) for one in drill.passed_over],
        "machine": {
            "platform": drill.platform,
            "name": None if machine is None else machine.name,
            "generation": None if machine is None else machine.generation,
            "isolated": True if machine is None else machine.isolated,
            "converted": machine is not None and bool(machine.conversions),
        },
        "checks": [asdict(one) for one in drill.outcomes],
        "cleaned": drill.cleaned,
        "notes": list(drill.notes),
    }


def signed(body: Mapping[str, Any], key: SigningKey, *, version: int = VERSION) -> bytes:
    """Return the document: its body, the public key, and the signature of both."""
    inner = {"format": FORMAT, "version": version, "body": body, "public_key": key.public.hex()}
    return _encoded({**inner, "signature": key.sign(_encoded(inner)).hex()})


def verify(path: Path, expected: str | None = None) -> Verified:
    """Verify a document, or the one that goes with a page or a picture, and what lies beside it.

    ``expected`` is the fingerprint that its signer is to have. Raises IntegrityError where anything of it is not what
    was signed, FormatVersionError, UsageError where there is none.
    """
    document = path if path.suffix == ".json" else path.with_suffix(".json")
    if path.suffix == ".png" and not document.exists():  # one of several pictures, of the drill of a plan
        document = path.with_name(f"{path.stem.rpartition('-')[0]}.json")
    held = _held(document, LARGEST_BYTES)
    body, signer = opened(held, str(document))
    if expected is not None and _plain(expected) != signer:
        raise IntegrityError(
            f"it was signed by the key {signer}, and not by the one that was expected",
            path=str(document),
            hint="compare with the fingerprint in the VM's record of the drill",
        )
    present, missing = [], []
    for name, digest in _files(body, str(document)):
        beside = document.with_name(name)
        if not beside.exists():
            missing.append(name)
        elif hashlib.sha256(_held(beside, LARGEST_FILE_BYTES)).hexdigest() != digest:
            raise IntegrityError("the file is not the one that the evidence names: it was altered", path=str(beside))
        else:
            present.append(name)
    if path != document and path.name not in present:
        raise IntegrityError("the evidence beside it does not name the file", path=str(path))
    return Verified(body, signer, tuple(present), tuple(missing))


def opened(held: bytes, path: str) -> tuple[dict[str, Any], str]:
    """Return the body of a document and its signer's fingerprint. Raises IntegrityError, FormatVersionError."""
    altered = IntegrityError("this is not what was signed: it was altered, or is no evidence of a drill", path=path)
    try:
        outer = json.loads(held)
        if not isinstance(outer, dict) or outer.get("format") != FORMAT:
            raise altered
        version = outer.get("version")
        if isinstance(version, int) and version > PLAN_VERSION:
            raise FormatVersionError(f"the evidence has version {version}", path=path, hint="a newer godwit reads it")
        body, public, signature = outer.get("body"), _bytes(outer, "public_key"), _bytes(outer, "signature")
        inner = {"format": FORMAT, "version": version, "body": body, "public_key": public.hex()}
        if (
            type(version) is not int
            or not isinstance(body, dict)
            or _encoded({**inner, "signature": signature.hex()}) != held
        ):
            raise altered
        if len(public) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
            raise altered
        data = _encoded(inner)
    except (ValueError, RecursionError, UnicodeError) as error:
        raise altered from error
    if not is_signed(public, signature, data):
        raise altered
    is_plan = version == PLAN_VERSION
    if not (_is_plan_shaped(body) if is_plan else _has_shape(body)):
        raise IntegrityError("it was signed, but not by a godwit: it lacks what evidence says", path=path)
    if not (_is_plan_consistent(body) if is_plan else _is_consistent(body)):
        raise IntegrityError("it was signed, but its verdict does not follow from its checks", path=path)
    return body, fingerprint(public)


def _has_shape(body: Mapping[str, Any]) -> bool:
    """Whether there is what people are shown of it."""
    vm, point, rto = body.get("vm"), body.get("point"), body.get("rto_seconds")
    return (
        (isinstance(vm, dict) and isinstance(vm.get("name"), str))
        and (point is None or (isinstance(point, dict) and {"number", "created_at"} <= point.keys()))
        and (rto is None or (isinstance(rto, (int, float)) and 0 <= rto < 1e9))
        and isinstance(body.get("begun_at"), str)
    )


def _is_consistent(body: Mapping[str, Any]) -> bool:
    checks, reasons = body.get("checks"), body.get("reasons")
    if (
        not isinstance(checks, list)
        or not isinstance(reasons, list)
        or not all(isinstance(one, dict) for one in checks)
    ):
        return False
    against = [one for one in checks if one.get("required") and not one.get("passed") and not one.get("skipped")]
    stands = not against and not reasons and body.get("cleaned") is True
    return body.get("verdict") == ("passed" if stands else "failed")


def _is_plan_shaped(body: Mapping[str, Any]) -> bool:
    """Whether there is what people are shown of the drill of a plan, and of each of its VMs."""
    plan, vms, rto = body.get("plan"), body.get("vms"), body.get("rto_seconds")
    return (
        (isinstance(plan, dict) and isinstance(plan.get("name"), str))
        and (isinstance(vms, list) and all(isinstance(one, dict) and _has_shape(one) for one in vms))
        and (rto is None or (isinstance(rto, (int, float)) and 0 <= rto < 1e9))
        and isinstance(body.get("begun_at"), str)
    )


def _is_plan_consistent(body: Mapping[str, Any]) -> bool:
    """Whether a plan passed only where each of its VMs did, by its own checks, and nothing else stands against it."""
    vms, reasons, names = body["vms"], body.get("reasons"), body["plan"].get("vms")
    if not isinstance(reasons, list) or not isinstance(names, list) or not all(map(_is_consistent, vms)):
        return False
    whole = names == [one["vm"]["name"] for one in vms]
    passed = whole and all(one.get("verdict") == "passed" for one in vms) and not reasons
    return body.get("verdict") == ("passed" if passed else "failed")


def _files(body: Mapping[str, Any], path: str) -> list[tuple[str, str]]:
    listed = body.get("files")
    found = []
    for one in listed if isinstance(listed, list) else ():
        name, digest = (one.get("name"), one.get("sha256")) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(digest, str) or not _FILE_NAME.fullmatch(name):
            raise IntegrityError("it names files in a way that this godwit does not", path=path)
        found.append((name, digest))
    return found


def _held(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            held = file.read(most + 1)
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    if len(held) > most:
        raise IntegrityError("the file is too large to be evidence", path=str(path))
    return held


def _bytes(outer: Mapping[str, Any], name: str) -> bytes:
    value = outer.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return bytes.fromhex(value)


def _encoded(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _plain(text: str) -> str:
    return text.strip().lower().removeprefix("sha256:").replace(":", "").replace(" ", "")


def _digest(parts: Any) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _manifest_digest(means: Means, number: int) -> str | None:
    try:
        return hashlib.sha256(means.store.get(means.found.keys.manifest(number))).hexdigest()
    except GodwitError:
        return None


def made_by() -> str:
    """Return by which program documents are made."""
    try:
        return f"godwit {installed_version('godwit-dr')}"
    except PackageNotFoundError:
        return "godwit of no version"


def _write_whole(path: Path, content: bytes) -> None:
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise GodwitError(
            f"the evidence cannot be written: {error.strerror}", path=str(path), hint="choose another --evidence"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
