"""Bucket policies: what they say to the letter, and what follows from it for every key that there is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from replica import keys
from replica.errors import ConfigurationError, UsageError
from replica.keys import PartId, PlanKeys, VmKeys
from replica.locking import Terms
from replica.policy import Format, Role, policy
from replica.stores.address import bucket_of

GOLDEN = Path(__file__).parent / "policies"
TERMS = Terms(timedelta(days=30))
VM = VmKeys("acme", "ab" * 16)
PART = PartId(3, 2, 1)
HISTORY = (VM.manifest(7), VM.map_part(PART), VM.segment(PART))
DESCRIPTION = (VM.vm, VM.settings(1), keys.name("acme", "web 1"), VM.conversion(7, 0))
LASTING = (*HISTORY, *DESCRIPTION, keys.STORE, keys.tenant_key("acme", 1))
PLAN = PlanKeys("acme", "keys")  # a name that is a part of other keys
PLANNED = (PLAN.run(3), PLAN.entry(3, 7))
DIGEST = keys.digest("acme", "ef" * 16, 0)
CHANGE = f"{keys.changes('acme')}{VM.vm_id}-s{1:020}.json"
PASSING = (DIGEST, CHANGE, *PLANNED, VM.lease, VM.pin(7), VM.hold(7, "cd" * 16), VM.condemned_list(1))


def everybody(format_: Format) -> list[tuple[Role, str]]:
    """Return a user for each role."""
    return [(role, role.value if format_ == "seaweedfs" else f"arn:aws:iam::123456789012:user/{role}") for role in Role]


def allows(made: dict[str, Any], user: str, action: str, key: str, *, condition: Iterable[str] = ()) -> bool:
    """Evaluate a policy as its servers do: what is denied is denied, else what is allowed is allowed.

    ``condition`` names the condition keys that the request has.
    """
    allowed = False
    for one in made["Statement"]:
        if not any(who.endswith(user) for who in one["Principal"]["AWS"]) or action not in one["Action"]:
            continue
        if not any(fnmatchcase(f"arn:aws:s3:::bucket/dr/{key}", resource) for resource in one["Resource"]):
            continue
        absent = one.get("Condition", {}).get("Null", {})
        if any(name in condition for name in absent) or "NumericGreaterThan" in one.get("Condition", {}):
            continue
        if one["Effect"] == "Deny":
            return False
        allowed = True
    return allowed


@pytest.mark.parametrize("format_", ["s3", "seaweedfs"])
@pytest.mark.parametrize("terms", [None, TERMS], ids=["unlocked", "locked"])
def test_policies_are_what_was_reviewed(format_: Format, terms: Terms | None) -> None:
    made = policy(everybody(format_), "bucket", "dr", format_=format_, terms=terms)
    golden = GOLDEN / f"{format_}-{'locked' if terms else 'unlocked'}.json"
    assert made == json.loads(golden.read_text()), f"look at the difference, then write it to {golden}"
    names = [one["Sid"] for one in made["Statement"]]
    assert len(set(names)) == len(names)
    assert all(name.isalnum() for name in names)


@pytest.mark.parametrize("format_", ["s3", "seaweedfs"])
@pytest.mark.parametrize("terms", [None, TERMS], ids=["unlocked", "locked"])
def test_every_key_is_what_the_roles_may_do_with_it(format_: Format, terms: Terms | None) -> None:
    made = policy(everybody(format_), "bucket", "dr", format_=format_, terms=terms)
    for key in (*LASTING, *PASSING):
        for user in ("agent", "retention", "recovery"):
            assert allows(made, user, "s3:GetObject", key)
        for action in ("s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObject"):
            assert not allows(made, "recovery", action, key, condition=["s3:if-none-match"])
        for action in ("s3:DeleteObject", "s3:DeleteObjectVersion"):
            assert not allows(made, "agent", action, key)
            deletable = (DIGEST, CHANGE, *PLANNED, *HISTORY, VM.pin(7), VM.hold(7, "cd" * 16), VM.condemned_list(1))
            assert allows(made, "retention", action, key) == (key in deletable)
    for key in (*HISTORY, *DESCRIPTION, *PLANNED, VM.hold(7, "cd" * 16)):
        assert allows(made, "agent", "s3:PutObject", key, condition=["s3:if-none-match"])
        assert allows(made, "agent", "s3:PutObject", key) == (format_ == "seaweedfs")
    for key in (keys.STORE, keys.tenant_key("acme", 1), VM.pin(7), VM.condemned_list(1)):
        assert not allows(made, "agent", "s3:PutObject", key, condition=["s3:if-none-match"])
    for user in ("agent", "retention"):
        for condition in ("s3:if-match", "s3:if-none-match"):
            assert allows(made, user, "s3:PutObject", VM.lease, condition=[condition])
        assert allows(made, user, "s3:PutObject", VM.lease) == (format_ == "seaweedfs")
        assert allows(made, user, "s3:PutObject", CHANGE, condition=["s3:if-none-match"])
    for condition in ("s3:if-match", "s3:if-none-match"):
        assert allows(made, "agent", "s3:PutObject", DIGEST, condition=[condition])
        assert not allows(made, "retention", "s3:PutObject", DIGEST, condition=[condition])
    assert allows(made, "agent", "s3:PutObject", DIGEST) == (format_ == "seaweedfs")
    assert allows(made, "retention", "s3:PutObjectRetention", VM.segment(PART)) == (terms is not None)


def test_what_lasts_is_all_that_points_need_and_no_more() -> None:
    assert all(map(keys.is_lasting, LASTING))
    assert not any(map(keys.is_lasting, PASSING))
    for key in (VM.lease, DIGEST):
        assert any(fnmatchcase(key, pattern) for pattern in keys.REPLACED)
    assert not any(fnmatchcase(key, pattern) for key in (*LASTING, CHANGE) for pattern in keys.REPLACED)


def test_users_are_named_as_servers_name_them() -> None:
    role = [(Role.RECOVERY, "arn:aws:iam::123456789012:role/rescue")]
    formats: tuple[Format, ...] = ("s3", "seaweedfs")
    for format_ in formats:
        made = policy(role, "bucket", format_=format_)
        assert made["Statement"][0]["Principal"] == {"AWS": ["arn:aws:iam::123456789012:role/rescue"]}
    named = policy([(Role.RECOVERY, "rescue")], "bucket", format_="seaweedfs")
    assert named["Statement"][0]["Principal"] == {"AWS": ["arn:aws:iam::000000000000:user/rescue"]}
    for wrong in ("", "two words", "über"):
        with pytest.raises(UsageError):
            policy([(Role.AGENT, wrong)], "bucket", format_="seaweedfs")
    with pytest.raises(UsageError, match="no ARN"):
        policy([(Role.AGENT, "agent")], "bucket")


def test_the_bucket_is_that_of_the_address() -> None:
    assert bucket_of("s3://bucket/a/b?endpoint=http://localhost:1") == ("bucket", "a/b")
    assert bucket_of("s3://bucket") == ("bucket", "")
    with pytest.raises(ConfigurationError):
        bucket_of("file:///folder")
    assert policy([(Role.RECOVERY, "arn:x")], "bucket")["Statement"][1]["Resource"] == ["arn:aws:s3:::bucket/*"]
