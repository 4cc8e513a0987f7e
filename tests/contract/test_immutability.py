"""Object Lock and least privilege on a real S3 server: what each role's credentials can do, and what they cannot."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from cli.main import run
from replica import (
    catalog,
    cycle,
    garbage,
    history,
    immutability,
    policy,
    protection,
    prune,
    retention,
    verify,
)
from replica.errors import ConfigurationError, ObjectLockedError, StoreRefusedError, UsageError
from replica.health import gathering
from replica.health.gathering import Gatherer
from replica.health.publishing import Publisher, Watched
from replica.host import Host, SystemClock
from replica.locking import Locks, Terms
from replica.policy import Role
from replica.stores.address import bucket_of, open_store
from replica.stores.probe import probe_store
from replica.stores.store import Store
from tests.support import servers
from tests.support.engine import BLOCK, WORKERS, Lab, SeededRandomness, make_host, random_blocks, restore_disk
from tests.support.servers import S3Server

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("seaweedfs")]

_BY_PATH = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
ROLES = ("agent", "retention", "recovery")
BLOCKS = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, aws_environment: None) -> Iterator[S3Server]:
    """A server where each role has an identity of its own, named by a profile."""
    folder = tmp_path_factory.mktemp("roles")
    profiles = folder / "credentials"
    profiles.write_text(
        "".join(f"[{name}]\naws_access_key_id={name}\naws_secret_access_key={name}-secret\n" for name in ROLES)
    )
    with pytest.MonkeyPatch.context() as patch, servers.seaweedfs(folder, others=ROLES) as running:
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profiles))
        yield running


@pytest.fixture(autouse=True)
def _merged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the maps of few points be merged, so that there is something to collect."""
    monkeypatch.setattr("replica.blockmap.MERGE_MAPS", 3)


class Site:
    """A store of its own, the roles' policy in force on its bucket, and a VM. There is one at a time in a bucket."""

    def __init__(self, server: S3Server, folder: Path, *, period: timedelta | None) -> None:
        self.server = server
        self.bucket = "plain-bucket" if period is None else "locked-bucket"  # each costs the server several volumes
        self.prefix = secrets.token_hex(6)
        self.admin = self._client(servers.ACCESS_KEY, servers.SECRET_KEY)
        if self.bucket not in [each["Name"] for each in self.admin.list_buckets()["Buckets"]]:
            self.admin.create_bucket(Bucket=self.bucket, ObjectLockEnabledForBucket=period is not None)
        self.host = Host(SystemClock(), SeededRandomness(1), "0" * 32, "site", folder / "state")
        store = self.store()
        terms = None if period is None else Terms(period)
        catalog.init_store(store, self.host, terms)
        made = policy.policy(
            [(Role(name), name) for name in ROLES], *bucket_of(store.url), format_="seaweedfs", terms=terms
        )
        self.admin.put_bucket_policy(Bucket=self.bucket, Policy=json.dumps(made))
        folder.mkdir(exist_ok=True)
        disk = folder / "disk.img"
        disk.write_bytes(random_blocks(1, BLOCKS))
        agent = self.store("agent")
        self.found, _ = protection.protect(agent, self.host, tenant="default", name="vm", disks=[disk])
        self.lab = Lab(folder, agent, self.host, self.found, (disk,))

    def _client(self, access_key: str, secret_key: str) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=access_key,
            aws_secret_access_key=secret_key,
            config=_BY_PATH,
        )

    def client(self, role: str) -> Any:
        return self._client(role, f"{role}-secret")

    def store(self, role: str | None = None, more: str = "") -> Store:
        who = "" if role is None else f"&profile={role}"
        return open_store(f"s3://{self.bucket}/{self.prefix}?endpoint={self.server.endpoint}{who}{more}")

    def change(self, turn: int) -> None:
        for block in range(BLOCKS - 2):
            self.lab.patch(block * BLOCK, random_blocks(turn * 100 + block, 1))

    def names(self) -> list[str]:
        pages = self.admin.list_object_versions(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return sorted({one["Key"] for one in pages["Versions"]})

    def assert_points_restore(self, store: Store, points: list[int]) -> None:
        for number in points:
            point = history.point(store, self.found.keys, number)
            assert restore_disk(store, make_host(), self.found, point) == self.lab.published[number][0]


def _is_refused(act: Callable[[], object]) -> bool:
    try:
        answer = act()
    except ClientError as error:
        assert error.response["ResponseMetadata"]["HTTPStatusCode"] in (400, 403, 405, 409), error
        return True
    # A request for several deletions succeeds, and says of each how it went.
    return isinstance(answer, dict) and bool(answer.get("Errors")) and not answer.get("Deleted")


def test_agents_replicate_and_can_delete_nothing(server: S3Server, tmp_path: Path) -> None:
    site = Site(server, tmp_path, period=None)
    for turn in range(3):
        site.change(turn)
        site.lab.replicate()
    agent = site.client("agent")
    names = site.names()
    assert {one.split("/")[5] for one in names if one.count("/") > 5} >= {"segments", "maps", "manifests", "settings"}
    for name in names:
        assert _is_refused(partial(agent.delete_object, Bucket=site.bucket, Key=name)), name
        several = {"Objects": [{"Key": name}]}
        assert _is_refused(partial(agent.delete_objects, Bucket=site.bucket, Delete=several)), name
    assert _is_refused(lambda: agent.put_object(Bucket=site.bucket, Key=f"{site.prefix}/godwit.json", Body=b"other"))
    assert _is_refused(
        lambda: agent.put_object(Bucket=site.bucket, Key=f"{site.prefix}/tenants/default/keys/1.json", Body=b"x")
    )
    assert _is_refused(lambda: agent.put_object(Bucket=site.bucket, Key="elsewhere", Body=b"x"))
    assert _is_refused(lambda: agent.delete_bucket_policy(Bucket=site.bucket))
    with pytest.raises(StoreRefusedError):
        prune.prune(site.store("agent"), site.host, site.found, rule=retention.parse("last:1"))
    assert site.names() == names
    site.assert_points_restore(site.store("recovery"), [1, 2, 3])
    report = verify.verify(site.store("recovery"), make_host(), site.found, full=True, workers=WORKERS)
    assert not report.damaged
    site.change(9)
    with pytest.raises(StoreRefusedError):
        cycle.replicate(site.store("recovery"), site.host, site.found, workers=WORKERS)


def test_retention_prunes_and_collects(server: S3Server, tmp_path: Path) -> None:
    site = Site(server, tmp_path, period=None)
    for turn in range(4):
        site.change(turn)
        site.lab.replicate()
    store = site.store("retention")
    assert [one.point for one in prune.prune(store, site.host, site.found, rule=retention.parse("last:1")).removed] == [
        1,
        2,
        3,
    ]
    for _ in range(2):
        references = garbage.survey(store, "default", workers=WORKERS)
        done = garbage.collect(store, site.host, site.found, references, grace=timedelta(0), workers=WORKERS)
    assert done.deleted.objects > 0
    assert done.locked.objects == 0
    site.assert_points_restore(site.store("recovery"), [4])
    with pytest.raises(StoreRefusedError):
        store.delete("godwit.json")
    with pytest.raises(StoreRefusedError):
        store.delete(site.found.keys.vm)


def test_nothing_that_agents_can_do_to_locked_points_keeps_them_from_being_restored(
    server: S3Server, tmp_path: Path
) -> None:
    site = Site(server, tmp_path, period=timedelta(hours=1))
    for turn in range(2):
        site.change(turn)
        site.lab.replicate()
    agent = site.client("agent")
    names = [name for name in site.names() if not name.endswith("lease.json")]
    before = {
        one["Key"]: one
        for one in site.admin.list_object_versions(Bucket=site.bucket, Prefix=f"{site.prefix}/")["Versions"]
    }
    soon = datetime.now(UTC) + timedelta(seconds=1)
    for name in names:
        version = before[name]["VersionId"]
        which = {"Bucket": site.bucket, "Key": name}
        assert _is_refused(partial(agent.delete_object, **which))
        assert _is_refused(partial(agent.delete_object, **which, VersionId=version))
        # Not even by whoever may do everything, nor for a shorter time.
        assert _is_refused(partial(site.admin.delete_object, **which, VersionId=version))
        shorter = {"Mode": "COMPLIANCE", "RetainUntilDate": soon}
        for client in (agent, site.admin):
            prolong = partial(client.put_object_retention, **which, VersionId=version, BypassGovernanceRetention=True)
            assert _is_refused(partial(prolong, Retention=shorter))
    suspended = {"Status": "Suspended"}
    assert _is_refused(lambda: agent.put_bucket_versioning(Bucket=site.bucket, VersioningConfiguration=suspended))
    # This server knows no policy that forbids overwriting, and whoever stole all rights can hide what he cannot delete.
    overwritten = [name for name in names if "/keys/" not in name and "godwit.json" not in name]
    for name in overwritten:
        agent.put_object(Bucket=site.bucket, Key=name, Body=b"encrypted; pay here")
    for name in names:
        site.admin.delete_object(Bucket=site.bucket, Key=name)
    with pytest.raises(UsageError):
        history.point(site.store("recovery"), site.found.keys, 1)

    rescued = site.store("recovery", "&versions=first")
    assert catalog.find(rescued, "default", site.found.vm.name) == site.found
    assert [one.point for one in history.points(rescued, site.found.keys) if not isinstance(one, Exception)] == [1, 2]
    site.assert_points_restore(rescued, [1, 2])
    with pytest.raises(UsageError):
        rescued.create("new", b"")


def test_digests_are_replaced_by_agents_swept_by_retention_and_read_by_their_last_version(
    server: S3Server, tmp_path: Path
) -> None:
    site = Site(server, tmp_path, period=timedelta(minutes=1))
    agent = site.store("agent")
    publisher, watched = Publisher(site.host, "default"), [Watched(site.found, "waiting")]
    publisher.publish(agent, watched)
    site.change(1)
    site.lab.replicate()
    publisher.note_doubt(site.found.keys.vm_id)
    assert publisher.publish(agent, watched).written == 1
    reader = make_host(name="reader", clock=SystemClock())  # type: ignore[arg-type]
    for more in ("", "&versions=first"):
        gathered = Gatherer(site.store("recovery", more), reader, "default").gather()
        assert (gathered.digests, gathered.direct, gathered.seen[0].listed) == (1, 0, 1), more
        assert gathered.seen[0].source_skew_seconds is not None
        assert abs(gathered.seen[0].source_skew_seconds) < 60
    catalog.update_settings(agent, site.host, site.found, interval_seconds=60)
    assert Gatherer(site.store("recovery"), reader, "default").gather().direct == 1
    publisher.publish(agent, watched)
    [name] = [name for name in site.names() if "/fleet/digests/" in name]
    assert _is_refused(lambda: site.client("agent").delete_object(Bucket=site.bucket, Key=name))
    assert _is_refused(lambda: site.client("recovery").put_object(Bucket=site.bucket, Key=name, Body=b"other"))
    later = site.host.clock.now() + timedelta(days=31)
    retention = site.store("retention")
    assert gathering.sweep(retention, "default", site.host.clock.now()) == 1, "the mark"
    assert gathering.sweep(retention, "default", later) == 1
    assert not [info.key for info in retention.list("tenants/default/fleet/")]


def test_housekeeping_waits_for_the_end_of_locks(server: S3Server, tmp_path: Path) -> None:
    rule = retention.parse("last:1")
    site = Site(server, tmp_path / "long", period=timedelta(hours=1))
    for turn in range(3):
        site.change(turn)
        site.lab.replicate()
    done = prune.prune(site.store("retention"), site.host, site.found, rule=rule)
    assert (done.removed, done.locked) == ((), (1, 2))
    site.assert_points_restore(site.store("recovery"), [1, 2, 3])

    period = timedelta(seconds=2)
    site = Site(server, tmp_path / "short", period=period)
    for turn in range(3):
        site.change(turn)
        site.lab.replicate()
    time.sleep((period * 3 / 2).total_seconds() + 1)
    store = site.store("retention")
    assert [one.point for one in prune.prune(store, site.host, site.found, rule=rule).removed] == [1, 2]
    for _ in range(2):
        references = garbage.survey(store, "default", workers=WORKERS)
        collected = garbage.collect(store, site.host, site.found, references, grace=timedelta(0), workers=WORKERS)
    assert collected.deleted.objects > 0
    assert collected.locked.objects == 0
    versions = site.admin.list_object_versions(Bucket=site.bucket, Prefix=f"{site.prefix}/")
    assert versions.get("DeleteMarkers", []) == []
    assert not [one for one in versions["Versions"] if one["Key"].endswith(f"manifests/{1:020}.json")]
    site.assert_points_restore(site.store("recovery"), [3])


def test_locks_are_prolonged_once_they_are_due(server: S3Server, tmp_path: Path) -> None:
    site = Site(server, tmp_path, period=timedelta(hours=1))
    for turn in range(2):
        site.change(turn)
        site.lab.replicate()
    store = site.store("retention")
    fresh = immutability.prolong(store, site.host, site.found, workers=WORKERS)
    assert (fresh.prolonged, fresh.missing) == (0, ())
    assert fresh.objects > 8

    class Later(SystemClock):
        def now(self) -> datetime:
            return datetime.now(UTC) + timedelta(minutes=20)

    later = Host(Later(), SeededRandomness(1), "0" * 32, "later", None)
    dry = immutability.prolong(store, later, site.found, dry_run=True, workers=WORKERS)
    assert dry.prolonged == dry.objects == fresh.objects
    assert _end(store, site.found.keys.manifest(1)) < datetime.now(UTC) + timedelta(minutes=91)
    done = immutability.prolong(store, later, site.found, workers=WORKERS)
    assert done.prolonged == done.objects
    assert _end(store, site.found.keys.manifest(1)) > datetime.now(UTC) + timedelta(minutes=109)
    assert immutability.prolong(store, later, site.found, workers=WORKERS).prolonged == 0
    # Of a point that the rule does not keep, nothing is prolonged that no kept one needs.
    rule = retention.parse("last:1")
    assert immutability.prolong(store, later, site.found, rule=rule, workers=WORKERS).objects < done.objects


def test_a_store_is_asked_whether_its_locks_hold(server: S3Server, tmp_path: Path) -> None:
    site = Site(server, tmp_path, period=timedelta(hours=1))
    assert immutability.prepare(site.store(), timedelta(hours=1)) == Terms(timedelta(hours=1))
    unlocked = open_store(f"s3://{server.bucket}/x?endpoint={server.endpoint}")
    with pytest.raises(ConfigurationError, match="no Object Lock"):
        immutability.prepare(unlocked, timedelta(days=30))
    with pytest.raises(ConfigurationError, match="no Object Lock"):
        immutability.prepare(open_store(str(tmp_path / "folder"), create=True), timedelta(days=30))
    assert catalog.read_store(site.store()).terms == Terms(timedelta(hours=1))
    with pytest.raises(ConfigurationError, match="already is a store"):
        immutability.require_terms(catalog.read_store(site.store()).terms, Terms(timedelta(days=2)))
    with pytest.raises(ObjectLockedError) as caught:
        site.store().delete(site.found.keys.vm)
    assert caught.value.until is not None


def _end(store: Store, key: str) -> datetime:
    locks = Locks(store)
    end = locks.locked_until(key, locks.first_versions(key)[key])
    assert end is not None
    return end


def test_from_the_command_line(
    server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A locked store is made, its policy printed and put in force, VMs replicated by an agent, their locks seen to."""
    Site(server, tmp_path, period=timedelta(hours=1))  # makes the bucket
    admin = boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", config=_BY_PATH)
    monkeypatch.setattr("cli.stores.probe_store", partial(probe_store, racers=2, rounds=1))  # races take seconds there
    prefix = secrets.token_hex(6)
    where = f"s3://locked-bucket/{prefix}?endpoint={server.endpoint}"
    disk = tmp_path / "os.img"
    disk.write_bytes(random_blocks(1, 4))

    def godwit(*arguments: str, role: str | None = None, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        url = where if role is None else f"{where}&profile={role}"
        assert run([*arguments, "--store", url, "--json"]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out or "null")  # type: ignore[no-any-return]

    assert godwit("init", "--immutable-for", "2h")["immutable_seconds"] == 7200
    godwit("init", "--immutable-for", "1h", code=13)
    users = [one for role in ROLES for one in ("--role", role, "--user", role)]
    made = godwit("policy", *users, "--format", "seaweedfs")
    admin.put_bucket_policy(Bucket="locked-bucket", Policy=json.dumps(made))
    godwit("protect", "web", "--disk", str(disk), role="agent")
    clone = tmp_path / "clone.img"
    clone.write_bytes(random_blocks(1, 4))
    godwit("replicate", "web", role="agent")
    godwit("protect", "clone", "--disk", str(clone), "--seed-from", "web@1", role="agent")
    assert godwit("replicate", "clone", role="agent")["reused_blocks"] == 4
    for name in ("web", "clone"):
        done = godwit("retain", name, role="retention")
        assert (done["prolonged"], done["missing"]) == (0, [])
    assert len(godwit("retain", "--all", role="retention")["prolongations"]) == 2
    # The agent could not let go of the point that the clone was seeded from; pruning does.
    held = [one["Key"] for one in admin.list_objects_v2(Bucket="locked-bucket")["Contents"] if "/holds/" in one["Key"]]
    assert len([key for key in held if key.startswith(prefix)]) == 1
    disk.write_bytes(random_blocks(9, 4))
    godwit("replicate", "web", role="agent")
    assert godwit("prune", "web", "--keep", "last:1", "--yes", role="retention")["locked"] == [1]
    assert godwit("prune", "web", "--keep", "last:1", "--yes", role="agent")["removed"] == []
    target = tmp_path / "restored"
    target.mkdir()
    godwit("restore", "clone", "--to", str(target), "--format", "raw", role="recovery")
    assert [path.read_bytes() for path in target.iterdir()] == [random_blocks(1, 4)]


def test_a_folder_cannot_be_locked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "store")
    assert run(["init", folder, "--immutable-for", "30d"]) == 13
    assert "no Object Lock" in capsys.readouterr().err
    assert run(["policy", "--role", "agent", "--user", "arn:aws:iam::1:user/x", "--store", folder]) == 13
