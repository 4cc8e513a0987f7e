"""The tenant's key: secrets told apart, wrong ones refused, rotations that leave a way in wherever they are cut off."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import keyring, keys, keysource, record, tenantkey
from replica.configuration import Configuration, load
from replica.errors import FormatVersionError, GodwitError, IntegrityError, TenantKeyError, UsageError
from replica.stores.memory import MemoryStore
from replica.tenantkey import Secret, parse
from tests.support.encryption import CHEAP_SCRYPT, OTHER_SECRET, SECRET, encrypted_lab, sealed, vault_for
from tests.support.engine import make_host, random_blocks
from tests.support.store_doubles import CrashingStore, RecordingStore, SimulatedCrash, crash_points

HOST = make_host()
PHRASE = tenantkey.passphrase("correct horse")


@pytest.fixture(autouse=True)
def _cheap() -> Iterator[None]:
    with CHEAP_SCRYPT:
        yield


@pytest.mark.parametrize("secret", [SECRET, PHRASE], ids=lambda secret: secret.kind)
def test_a_key_opens_with_its_secret_alone(secret: Secret) -> None:
    store = MemoryStore()
    made = tenantkey.init(store, HOST, "t", secret)
    master = tenantkey.open_master(store, "t", secret)
    assert len(master) == 32
    assert (made.number, made.kind, made.fingerprint) == (1, secret.kind, tenantkey.fingerprint(master))
    assert tenantkey.list_keys(store, "t") == [made]
    for wrong in (OTHER_SECRET, tenantkey.passphrase("correct Horse"), Secret("key", b"correct horse".ljust(32))):
        with pytest.raises(TenantKeyError, match="does not open the key of tenant 't'") as caught:
            tenantkey.open_master(store, "t", wrong)
        assert caught.value.exit_code == 13
        assert ("opened by a" in str(caught.value)) == (wrong.kind != secret.kind)
    with pytest.raises(TenantKeyError, match="no key was given"):
        tenantkey.open_master(store, "t", None)


def test_no_secret_and_no_master_key_lies_in_the_store_or_in_what_is_printed() -> None:
    store = MemoryStore()
    shown = repr([tenantkey.init(store, HOST, "t", PHRASE), PHRASE, SECRET])
    master = tenantkey.open_master(store, "t", PHRASE)
    held = b"".join(store.get(info.key) for info in store.list(""))
    for secret in (master, PHRASE.data):
        assert secret not in held
        assert secret.hex().encode() not in held
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown
    wrapped = json.loads(store.get(keys.tenant_key("t", 1)))["body"]["wrapped_key"]
    assert wrapped[:20] not in shown


def test_two_tenants_have_keys_of_their_own_that_cannot_be_exchanged() -> None:
    store = MemoryStore()
    for tenant in ("one", "two"):
        tenantkey.init(store, HOST, tenant, SECRET)
    assert tenantkey.open_master(store, "one", SECRET) != tenantkey.open_master(store, "two", SECRET)
    other = MemoryStore()
    other.create(keys.tenant_key("two", 1), store.get(keys.tenant_key("one", 1)))
    with pytest.raises(TenantKeyError, match="does not open"):
        tenantkey.open_master(other, "two", SECRET)


def test_a_tenant_gets_one_key_only() -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", SECRET)
    with pytest.raises(UsageError, match="has a key already"):
        tenantkey.init(store, HOST, "t", OTHER_SECRET)
    assert tenantkey.open_master(store, "t", SECRET)


def test_every_flipped_bit_of_a_key_object_is_told_from_a_wrong_key() -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", SECRET)
    key = keys.tenant_key("t", 1)
    good = store.get(key)
    for at in range(len(good)):
        for bit in (0, 5):
            damaged = bytearray(good)
            damaged[at] ^= 1 << bit
            other = MemoryStore()
            other.create(key, damaged)
            with pytest.raises((IntegrityError, FormatVersionError)):
                tenantkey.open_master(other, "t", SECRET)


@pytest.mark.parametrize(
    "change",
    [
        {"cost": 1 << 25},
        {"cost": 3},
        {"cost": 0},
        {"block": 1 << 20},
        {"parallel": 1000},
        {"salt": "zz"},
        {"name": "argon2id"},
        {"name": 3},
    ],
    ids=str,
)
def test_what_a_store_may_make_us_compute_is_bounded(change: dict[str, object]) -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", PHRASE)
    key = keys.tenant_key("t", 1)
    body = json.loads(store.get(key))["body"]
    body["kdf"] |= change
    store.delete(key)
    store.create(key, record.encode("key", body))
    with pytest.raises((IntegrityError, FormatVersionError), match=key):
        tenantkey.open_master(store, "t", PHRASE)


def test_cheaper_parameters_than_were_chosen_open_nothing() -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", PHRASE)
    key = keys.tenant_key("t", 1)
    body = json.loads(store.get(key))["body"]
    for change in ({"kdf": {**body["kdf"], "cost": 2}}, {"fingerprint": "0" * 16}):
        store.delete(key)
        store.create(key, record.encode("key", {**body, **change}))
        with pytest.raises(TenantKeyError):
            tenantkey.open_master(store, "t", PHRASE)


def test_a_rotation_changes_the_secret_and_nothing_else() -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", SECRET)
    master = tenantkey.open_master(store, "t", SECRET)
    made = tenantkey.rotate(store, HOST, "t", SECRET, PHRASE)
    assert (made.number, made.kind) == (2, "passphrase")
    assert tenantkey.open_master(store, "t", PHRASE) == master
    with pytest.raises(TenantKeyError):
        tenantkey.open_master(store, "t", SECRET)
    assert [one.number for one in tenantkey.list_keys(store, "t")] == [2]
    assert tenantkey.rotate(store, HOST, "t", PHRASE, OTHER_SECRET).number == 3


def test_a_rotation_with_a_wrong_key_writes_nothing() -> None:
    store = RecordingStore(MemoryStore())
    tenantkey.init(store, HOST, "t", SECRET)
    store.forget()
    for wrong in (None, OTHER_SECRET, PHRASE, Secret("recovery", b"r" * 32)):
        with pytest.raises(TenantKeyError):
            tenantkey.rotate(store, HOST, "t", wrong, PHRASE)
    assert store.writes == ()


def test_a_rotation_cut_off_at_every_write_leaves_a_way_in_and_can_be_repeated() -> None:
    counted = RecordingStore(MemoryStore())
    tenantkey.init(counted, HOST, "t", SECRET)
    counted.forget()
    tenantkey.rotate(counted, HOST, "t", SECRET, PHRASE)
    assert len(counted.writes) == 2
    for at, mode in crash_points(len(counted.writes)):
        store = MemoryStore()
        tenantkey.init(store, HOST, "t", SECRET)
        master = tenantkey.open_master(store, "t", SECRET)
        crashing = CrashingStore(store, at=at, mode=mode)
        with contextlib.suppress(SimulatedCrash, GodwitError):
            tenantkey.rotate(crashing, HOST, "t", SECRET, PHRASE)
        assert crashing.crashed
        good = [secret for secret in (SECRET, PHRASE) if _opens(store, secret, master)]
        assert good
        tenantkey.rotate(store, HOST, "t", good[0], OTHER_SECRET)
        assert [_opens(store, one, master) for one in (SECRET, PHRASE, OTHER_SECRET)] == [False, False, True]


def test_while_a_rotation_is_not_finished_both_secrets_open_the_key() -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", SECRET)
    old = store.get(keys.tenant_key("t", 1))
    tenantkey.rotate(store, HOST, "t", SECRET, PHRASE)
    store.create(keys.tenant_key("t", 1), old)
    assert tenantkey.open_master(store, "t", SECRET) == tenantkey.open_master(store, "t", PHRASE)
    assert [one.number for one in tenantkey.list_keys(store, "t")] == [2, 1]


def _opens(store: MemoryStore, secret: Secret, master: bytes) -> bool:
    try:
        return tenantkey.open_master(store, "t", secret) == master
    except TenantKeyError:
        return False


def test_two_rotations_at_once_do_not_overwrite_each_other() -> None:
    class Slow(RecordingStore):
        def create(self, key: str, data: bytes | bytearray | memoryview) -> str:
            tenantkey.rotate(self.inner, HOST, "t", SECRET, OTHER_SECRET)
            return super().create(key, data)

    store = MemoryStore()
    tenantkey.init(store, HOST, "t", SECRET)
    with pytest.raises(UsageError, match="at this moment"):
        tenantkey.rotate(Slow(store), HOST, "t", SECRET, PHRASE)
    assert tenantkey.open_master(store, "t", OTHER_SECRET)


# --- recovery kit


def test_the_recovery_kit_opens_what_was_encrypted_and_finds_its_mistakes(tmp_path: Path) -> None:
    store = MemoryStore()
    tenantkey.init(store, HOST, "t", PHRASE)
    master = tenantkey.open_master(store, "t", PHRASE)
    keysource.write_recovery_kit(tmp_path / "kit", "t", store.url, master)
    assert (tmp_path / "kit").stat().st_mode & 0o777 == 0o600
    kit = keysource.read_key_file(tmp_path / "kit")
    assert kit.kind == "recovery"
    assert tenantkey.open_master(store, "t", kit) == master
    assert tenantkey.open_master(MemoryStore(), "t", kit) == master  # also when no key object is left
    other = MemoryStore()
    tenantkey.init(other, HOST, "t", PHRASE)
    with pytest.raises(TenantKeyError, match="not that of tenant 't'"):
        tenantkey.open_master(other, "t", kit)
    text = (tmp_path / "kit").read_bytes()
    line = tenantkey.recovery_line(master).encode()
    wrong = line[:30] + (b"0" if line[30:31] != b"0" else b"1") + line[31:]
    with pytest.raises(TenantKeyError, match="typing mistake"):
        parse(text.replace(line, wrong), source="kit")
    with pytest.raises(TenantKeyError, match="exists already"):
        keysource.write_recovery_kit(tmp_path / "kit", "t", store.url, master)
    assert tenantkey.rotate(store, HOST, "t", kit, SECRET).number == 2
    assert tenantkey.open_master(store, "t", SECRET) == master
    for call in (tenantkey.init, lambda *a: tenantkey.rotate(*a[:3], SECRET, a[3])):
        with pytest.raises(UsageError, match="recovery kit"):
            call(MemoryStore() if call is tenantkey.init else store, HOST, "t", kit)


def test_no_second_key_is_made_where_a_lost_one_encrypted_vms(tmp_path: Path) -> None:
    store = MemoryStore()
    lab = encrypted_lab(tmp_path, [random_blocks(1, 1)], store)
    master = tenantkey.open_master(store, "default", SECRET)
    store.delete(keys.tenant_key("default", 1))
    with pytest.raises(UsageError, match="'web 1' is encrypted by a key that is missing"):
        keyring.init(sealed(store), lab.host, "default", SECRET)
    tenantkey.rotate(store, lab.host, "default", Secret("recovery", master), OTHER_SECRET)
    vault = vault_for(OTHER_SECRET)
    assert keyring.check(vault.around(store), "default", vault).encrypted == ("web 1",)


# --- where the secret comes from


@pytest.mark.parametrize(
    "content",
    [
        SECRET.data,
        SECRET.data.hex().encode(),
        SECRET.data.hex().upper().encode() + b"\r\n",
        SECRET.data.hex().encode() + b"\n",
    ],
)
def test_a_key_file_holds_bytes_or_digits(content: bytes) -> None:
    assert parse(content, source="f") == SECRET


@pytest.mark.parametrize("content", [b"", b"secret", b"0" * 63, b"0" * 65, b"\xff" * 31, b"\xff" * 33, b"g" * 64])
def test_what_is_no_key_is_refused_without_showing_it(content: bytes) -> None:
    with pytest.raises(TenantKeyError, match="this is no key") as caught:
        parse(content, source="the/file")
    assert caught.value.path == "the/file"
    assert not content or content.decode("latin-1") not in f"{caught.value}{caught.value.hint}"


def configuration_of(tmp_path: Path, **fields: object) -> Configuration:
    (tmp_path / "godwit.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    return load(environment={}, file=tmp_path / "godwit.toml")


def test_the_key_is_looked_for_in_order(tmp_path: Path) -> None:
    for number, name in enumerate(("by environment", "by configuration")):
        (tmp_path / name).write_bytes(bytes([number]) * 32)
    command = [sys.executable, "-c", "print('03' * 32)"]
    both = configuration_of(tmp_path, key_file=str(tmp_path / "by configuration"), key_command=command)
    by_command = configuration_of(tmp_path, key_command=command)
    nothing = configuration_of(tmp_path)
    environment = {"GODWIT_KEY_FILE": str(tmp_path / "by environment"), "GODWIT_PASSPHRASE": "a passphrase"}

    def asked(question: str) -> str | None:
        return "an answer"

    found = [
        keysource.given_secret(both, environment, asked),
        keysource.given_secret(both, {"GODWIT_PASSPHRASE": "a passphrase", "GODWIT_KEY_FILE": ""}, asked),
        keysource.given_secret(both, {}, asked),
        keysource.given_secret(by_command, {}, asked),
        keysource.given_secret(nothing, {}, asked),
        keysource.given_secret(nothing, {}, lambda question: None),
    ]
    assert [one and one.data for one in found] == [
        bytes(32),
        b"a passphrase",
        b"\1" * 32,
        b"\3" * 32,
        b"an answer",
        None,
    ]


def test_a_key_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = keysource.make_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keysource.make_key_file(path) == made == keysource.read_key_file(path)
    assert keysource.make_key_file(tmp_path / "other") != made
    with pytest.raises(TenantKeyError, match="cannot be made"):
        keysource.make_key_file(tmp_path / "no folder" / "key")
    with pytest.raises(TenantKeyError, match="cannot be read"):
        keysource.read_key_file(tmp_path / "none")


@pytest.mark.parametrize(
    "command, message",
    [
        ([sys.executable, "-c", "import sys; sys.exit('the agent is locked')"], "exit code 1: the agent is locked"),
        ([sys.executable, "-c", "print('nonsense')"], "this is no key"),
        (["/no/such/command"], "cannot be run"),
        ("unbalanced 'quote", "cannot be understood"),
        ("   ", "is empty"),
        (["a\0b"], "cannot be run"),
    ],
)
def test_a_key_command_that_fails_says_why(command: str | list[str], message: str) -> None:
    with pytest.raises(TenantKeyError, match=message):
        keysource.run_key_command(command)


def test_a_short_passphrase_is_refused() -> None:
    with pytest.raises(TenantKeyError, match="too short"):
        tenantkey.passphrase("1234567")
