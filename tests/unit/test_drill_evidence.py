"""Evidence of drills: what was altered in any byte is found, the key is known, and hostile texts harm nothing."""

from __future__ import annotations

import html.parser
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from replica import signing
from replica.drills import evidence, page
from replica.drills.checks import Kind
from replica.drills.recording import Recorded
from replica.errors import ConfigurationError, FormatVersionError, IntegrityError, UsageError
from replica.signing import SigningKey, host_key
from tests.support.drills import Range, check, make_range
from tests.support.failover import make_site

HOSTILE = "</style><script>alert(1)</script><img src=x onerror=alert(2)> \x1b[2J \u202e \ud800 \" ' &"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Range:
    folder = tmp_path_factory.mktemp("range")
    return make_range(make_site(folder), folder / "evidence")


@pytest.fixture(scope="module")
def done(place: Range) -> Recorded:
    return place.drill(check(Kind.AGENT), check(Kind.SCREENSHOT))


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return host_key(tmp_path)


def test_every_byte_of_the_document_counts(done: Recorded) -> None:
    held = done.written.document.read_bytes()
    evidence.opened(held, "it")
    drawn = random.Random(1)
    for at in range(len(held)):
        altered = bytearray(held)
        altered[at] ^= 1 << drawn.randrange(8)
        with pytest.raises((IntegrityError, FormatVersionError)):
            evidence.opened(bytes(altered), "it")


@pytest.mark.parametrize(("before", "after"), [(b" ", b"\t"), (b"\n", b"\r"), (b"a", b"A"), (b"\n", b"\n\n")])
def test_another_spelling_of_the_same_is_refused(done: Recorded, before: bytes, after: bytes) -> None:
    held = done.written.document.read_bytes()
    at = held.index(b'"signature"') + 16
    at = held.index(before, at)
    altered = held[:at] + after + held[at + len(before) :]
    with pytest.raises(IntegrityError):
        evidence.opened(altered, "it")


def test_what_is_cut_off_or_no_evidence_is_refused(done: Recorded) -> None:
    held = done.written.document.read_bytes()
    for bad in (b"", b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, held[:-1], held + b" ", b"\xff\xfe"):
        with pytest.raises(IntegrityError):
            evidence.opened(bad, "it")


def test_pages_and_pictures_are_verified_with_it(done: Recorded, tmp_path: Path) -> None:
    files = [done.written.document, done.written.page, done.written.picture]
    copies = []
    for file in files:
        assert file is not None
        copies.append(tmp_path / file.name)
        copies[-1].write_bytes(file.read_bytes())
    for copy in copies:
        assert evidence.verify(copy).missing == ()
    for copy in copies[1:]:
        held = copy.read_bytes()
        copy.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
        with pytest.raises(IntegrityError, match="altered") as caught:
            evidence.verify(copies[0])
        assert caught.value.path == str(copy)
        copy.unlink()
        assert copy.name in evidence.verify(copies[0]).missing
        copy.write_bytes(held)


def test_another_file_beside_it_is_not_taken_for_its_page(done: Recorded) -> None:
    other = done.written.document.with_suffix(".htm")
    other.write_text("passed")
    with pytest.raises(IntegrityError, match="does not name"):
        evidence.verify(other)
    with pytest.raises(UsageError, match="cannot read"):
        evidence.verify(done.written.document.with_name("none.json"))


def test_whoever_signs_anew_is_known_by_another_key(done: Recorded, key: SigningKey, tmp_path: Path) -> None:
    body = json.loads(done.written.document.read_bytes())["body"]
    body["vm"]["name"] = "another"
    forged = tmp_path / "forged.json"
    forged.write_bytes(evidence.signed(body, key))
    assert evidence.verify(forged).fingerprint == key.fingerprint
    evidence.verify(forged, f"SHA256:{key.fingerprint.upper()}")
    with pytest.raises(IntegrityError, match="not by the one that was expected"):
        evidence.verify(forged, done.written.fingerprint)


def test_a_verdict_that_does_not_follow_is_refused(done: Recorded, key: SigningKey) -> None:
    body = json.loads(done.written.document.read_bytes())["body"]
    for change in ({"cleaned": False}, {"reasons": ["no"]}, {"verdict": "failed"}, {"checks": None}, {"reasons": None}):
        with pytest.raises(IntegrityError, match="does not follow"):
            evidence.opened(evidence.signed({**body, **change}, key), "it")
    against = {"required": True, "passed": False}
    with pytest.raises(IntegrityError, match="does not follow"):
        evidence.opened(evidence.signed({**body, "checks": [against]}, key), "it")
    for lacking in ("vm", "begun_at"):
        with pytest.raises(IntegrityError, match="lacks"):
            evidence.opened(evidence.signed({**body, lacking: None}, key), "it")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", 5, None, "a\0b"])
def test_files_are_named_beside_it_alone(done: Recorded, key: SigningKey, tmp_path: Path, name: object) -> None:
    body = json.loads(done.written.document.read_bytes())["body"]
    body["files"] = [{"name": name, "sha256": "0" * 64}]
    path = tmp_path / "it.json"
    path.write_bytes(evidence.signed(body, key))
    with pytest.raises(IntegrityError):
        evidence.verify(path)


def test_a_later_version_is_told_as_that(done: Recorded) -> None:
    outer = json.loads(done.written.document.read_bytes())
    with pytest.raises(FormatVersionError):
        evidence.opened(json.dumps({**outer, "version": 3}).encode(), "it")


class _Reader(html.parser.HTMLParser):
    """Notes which elements and attributes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_hostile_texts_are_shown_and_run_nothing(place: Range, key: SigningKey) -> None:
    place.guest.programs["evil",] = (0, HOSTILE.encode("utf-8", "surrogatepass"), b"")
    hostile = replace(check(Kind.COMMAND, command=("evil",)), name=HOSTILE)
    done = place.drill(check(Kind.AGENT), hostile, replace(hostile, status=1))
    assert not done.drill.passed
    text = done.written.page.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    assert "script" not in reader.tags and "img" in reader.tags
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert all(one.startswith("data:image/png;base64,") for one in reader.sources)
    assert "default-src &#x27;none&#x27;" in text and "\u202e" not in text and "\x1b" not in text
    assert "&lt;script&gt;" in text and "\\u202e" in text

    body = json.loads(done.written.document.read_bytes())["body"]

    def poisoned(value: object) -> object:
        if isinstance(value, str):
            return value + HOSTILE
        if isinstance(value, dict):
            return {name: poisoned(one) for name, one in value.items()}
        return [poisoned(one) for one in value] if isinstance(value, list) else value

    spoiled = poisoned(body)
    assert isinstance(spoiled, dict)
    reader = _Reader()
    shown = page.page(spoiled, None, HOSTILE, HOSTILE)
    reader.feed(shown)
    assert "script" not in reader.tags and "img" not in reader.tags
    assert shown.count("<style>") == 1
    shown.encode()  # lone surrogates are shown as what they are


# --- the key


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made = host_key(tmp_path / "state")
    assert host_key(tmp_path / "state") == made
    path = tmp_path / "state" / signing.KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.private.hex() not in repr(made)
    assert [one.name for one in (tmp_path / "state").iterdir()] == [signing.KEY_FILE]
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="others than its owner"):
        host_key(tmp_path / "state")


@pytest.mark.parametrize("content", [b"", b"0" * 63, b"g" * 64, b"0" * 66])
def test_what_is_no_key_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / signing.KEY_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="no signing key"):
        host_key(tmp_path)
    assert path.read_bytes() == content


def test_a_key_that_somebody_else_makes_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = host_key(tmp_path / "theirs")
    link = signing.os.link

    def late(source: Path, target: Path) -> None:
        Path(target).write_bytes((tmp_path / "theirs" / signing.KEY_FILE).read_bytes())
        Path(target).chmod(0o600)
        link(source, target)

    monkeypatch.setattr(signing.os, "link", late)
    assert host_key(tmp_path / "ours").fingerprint == theirs.fingerprint


def test_signatures_are_of_what_was_signed(key: SigningKey) -> None:
    signature = key.sign(b"this")
    assert signing.is_signed(key.public, signature, b"this")
    assert not signing.is_signed(key.public, signature, b"that")
    assert not signing.is_signed(key.public, signature[:-1], b"this")
    assert not signing.is_signed(b"no key", signature, b"this")
    # RFC 8032, section 7.1, test 2
    known = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signed = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert signing.is_signed(known, signed, b"\x72")
