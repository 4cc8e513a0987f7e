"""Sealed objects: they open whole and by range, and under no other key, place, number or length."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replica import sealing
from replica.errors import FormatVersionError, GodwitError, IntegrityError
from replica.sealing import CHUNK_BYTES, HEADER_BYTES, STORED_CHUNK_BYTES, Sealer, plain_size, stored_size

KEY = "tenants/t/vms/v/segments/1/1-0"
SEALER = Sealer(b"k" * 32)
SIZES = [0, 1, 100, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 17]


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def chunks_of(stored: bytes | bytearray) -> list[bytes]:
    return [bytes(stored[at : at + STORED_CHUNK_BYTES]) for at in range(HEADER_BYTES, len(stored), STORED_CHUNK_BYTES)]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sealed_opens_and_has_the_size_that_is_said(size: int) -> None:
    data = content(size)
    stored = SEALER.seal(KEY, data)
    assert len(stored) == stored_size(size)
    assert plain_size(len(stored)) == size
    assert SEALER.open(KEY, stored) == data
    assert Sealer(b"k" * 32).open(KEY, stored) == data


@given(st.integers(0, 1 << 22))
def test_sizes_go_there_and_back(size: int) -> None:
    assert plain_size(stored_size(size)) == size


def test_sizes_that_no_sealed_object_has_are_none() -> None:
    real = {stored_size(size) for size in range(2 * CHUNK_BYTES)}
    for stored in [*range(200), *range(HEADER_BYTES + STORED_CHUNK_BYTES - 5, HEADER_BYTES + STORED_CHUNK_BYTES + 100)]:
        assert (plain_size(stored) is not None) == (stored in real), stored


@pytest.mark.parametrize("size", [CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 17])
def test_any_run_of_chunks_opens_alone(size: int) -> None:
    data = content(size)
    chunks = chunks_of(SEALER.seal(KEY, data))
    for first in range(len(chunks)):
        for end in range(first + 1, len(chunks) + 1):
            opened = SEALER.open_chunks(KEY, b"".join(chunks[first:end]), first)
            assert opened == data[first * CHUNK_BYTES : end * CHUNK_BYTES]


def test_every_flipped_bit_of_a_small_object_is_found() -> None:
    stored = SEALER.seal(KEY, content(40))
    for at in range(len(stored) * 8):
        damaged = bytearray(stored)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises((IntegrityError, FormatVersionError), match=KEY):
            SEALER.open(KEY, bytes(damaged))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, stored_size(2 * CHUNK_BYTES + 9) - 1), st.integers(1, 255))
def test_a_flipped_byte_of_a_large_object_is_found(at: int, flip: int) -> None:
    damaged = bytearray(LARGE)
    damaged[at] ^= flip
    with pytest.raises((IntegrityError, FormatVersionError), match=KEY):
        SEALER.open(KEY, bytes(damaged))


LARGE = SEALER.seal(KEY, content(2 * CHUNK_BYTES + 9))


@pytest.mark.parametrize(
    "other_key, other_sealer",
    [(KEY[:-1] + "1", SEALER), (KEY, Sealer(b"l" * 32)), ("", SEALER)],
    ids=["another object", "another VM", "no name"],
)
def test_an_object_opens_in_its_place_and_with_its_key_alone(other_key: str, other_sealer: Sealer) -> None:
    for size in (0, 50, CHUNK_BYTES + 5):
        with pytest.raises(IntegrityError):
            other_sealer.open(other_key, SEALER.seal(KEY, content(size)))


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 3 * CHUNK_BYTES, 2 * CHUNK_BYTES + 9])
def test_cut_anywhere_also_between_chunks_it_does_not_open(size: int) -> None:
    stored = SEALER.seal(KEY, content(size))
    at_chunks = [HEADER_BYTES + n * STORED_CHUNK_BYTES for n in range(len(stored) // STORED_CHUNK_BYTES + 1)]
    for length in {0, 5, HEADER_BYTES, *at_chunks, len(stored) - 1} - {len(stored)}:
        with pytest.raises(IntegrityError):
            SEALER.open(KEY, stored[:length])
    with pytest.raises(IntegrityError):
        SEALER.open(KEY, stored + b"\0")


def test_chunks_in_another_order_or_number_do_not_open() -> None:
    stored = SEALER.seal(KEY, content(3 * CHUNK_BYTES))
    a, b, c = chunks_of(stored)
    for wrong in ([b, a, c], [a, c], [a, a, c], [a, b, b], [a, b, c, c]):
        with pytest.raises(IntegrityError):
            SEALER.open(KEY, stored[:HEADER_BYTES] + b"".join(wrong))
    for at, chunk in ((0, b), (1, a), (2, a)):
        with pytest.raises(IntegrityError, match=f"chunk {at}"):
            SEALER.open_chunks(KEY, chunk, at)


def test_chunks_of_two_writings_of_one_object_do_not_mix() -> None:
    first, second = (SEALER.seal(KEY, content(2 * CHUNK_BYTES)) for _ in range(2))
    mixed = chunks_of(first)[0] + chunks_of(second)[1]
    with pytest.raises(IntegrityError, match="chunk 1"):
        SEALER.open(KEY, first[:HEADER_BYTES] + mixed)
    with pytest.raises(IntegrityError, match="chunk 1"):
        SEALER.open_chunks(KEY, mixed, 0)


def test_no_nonce_is_used_twice() -> None:
    nonces = [chunk[:12] for _ in range(200) for chunk in chunks_of(SEALER.seal(KEY, bytes(4 * CHUNK_BYTES + 1)))]
    assert len(set(nonces)) == len(nonces) == 1000


def test_the_same_bytes_never_look_the_same() -> None:
    data = content(CHUNK_BYTES) * 2
    seen = [chunk[12:] for key in (KEY, KEY + "1") for _ in range(2) for chunk in chunks_of(SEALER.seal(key, data))]
    assert len(set(seen)) == 8


def test_another_suite_is_named_and_what_is_not_sealed_is_told() -> None:
    stored = bytearray(SEALER.seal(KEY, b"x"))
    stored[10] = 9
    with pytest.raises(IntegrityError, match="header is damaged"):  # what follows it is of this suite
        SEALER.open(KEY, bytes(stored))
    stored[-1] ^= 1  # sealed in a way that is not known here
    with pytest.raises(FormatVersionError, match="suite 9"):
        SEALER.open(KEY, bytes(stored))
    with pytest.raises(IntegrityError, match="not encrypted although"):
        SEALER.open(KEY, b'{"body":{}}' * 9)


def test_a_wrapped_key_opens_with_what_it_is_bound_to_alone() -> None:
    wrapped = sealing.wrap(b"k" * 32, b"secret" * 5, b"here")
    assert sealing.unwrap(b"k" * 32, wrapped, b"here") == b"secret" * 5
    assert sealing.unwrap(b"l" * 32, wrapped, b"here") is None
    assert sealing.unwrap(b"k" * 32, wrapped, b"there") is None
    for at in range(len(wrapped)):
        assert sealing.unwrap(b"k" * 32, wrapped[:at], b"here") is None
        assert sealing.unwrap(b"k" * 32, wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :], b"here") is None


def test_derivation_is_one_step_of_hkdf() -> None:
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
    from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand  # noqa: PLC0415

    for key, purpose in ((b"k" * 32, b"one"), (bytes(32), b""), (b"x" * 32, b"godwit object\0some/key")):
        assert sealing.derive(key, purpose) == HKDFExpand(SHA256(), 32, purpose).derive(key)


def test_errors_are_godwits_own_whatever_the_bytes() -> None:
    drawn = random.Random(1)
    for size in [*range(80), 300, STORED_CHUNK_BYTES + HEADER_BYTES]:
        for data in (drawn.randbytes(size), b"GWSEALED\x01\0\x01" + drawn.randbytes(size), sealing.MAGIC):
            with pytest.raises(GodwitError):
                SEALER.open(KEY, data)
