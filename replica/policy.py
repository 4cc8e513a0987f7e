"""Bucket policies: the least that each role needs of a store's objects, derived from the patterns of their keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Final, Literal, TypeAlias

from replica import keys
from replica.errors import UsageError
from replica.locking import Terms

Format: TypeAlias = Literal["s3", "seaweedfs"]
Statement: TypeAlias = dict[str, Any]

VERSION: Final = "2012-10-17"
_SEAWEEDFS_USER: Final = "arn:aws:iam::000000000000:user/"
_DELETE: Final = ("s3:DeleteObject", "s3:DeleteObjectVersion")
_LOCK: Final = ("s3:GetObjectRetention", "s3:PutObjectRetention")


class Role(StrEnum):
    """Who works on a store, each with credentials of its own."""

    AGENT = "agent"  # protects and replicates: adds, never deletes or overwrites
    RETENTION = "retention"  # prunes, collects, prolongs locks
    RECOVERY = "recovery"  # reads


def policy(
    users: Sequence[tuple[Role, str]],
    bucket: str,
    prefix: str = "",
    *,
    format_: Format = "s3",
    terms: Terms | None = None,
) -> dict[str, Any]:
    """Return the bucket policy that gives each of ``users`` its role, and takes from it all that the role must not do.

    A user is an ARN, or for SeaweedFS the name of an identity. ``terms`` are those of a store whose objects are
    locked. AWS holds writes to their conditions by it; SeaweedFS (4.48) knows no such keys, so that there an agent can
    put a new version over an object, and only Object Lock keeps the one below. Raises UsageError.
    """
    statements: list[Statement] = []
    for number, (role, user) in enumerate(users, start=1):
        if not user or any(ord(c) < 33 or ord(c) > 126 for c in user):
            raise UsageError(f"{user!r} names no user", hint="write the ARN of a user or role, or a SeaweedFS identity")
        if format_ == "s3" and not user.startswith("arn:"):
            raise UsageError(f"{user!r} is no ARN", hint="write it out, as in arn:aws:iam::123456789012:user/NAME")
        made = _Statements(bucket, prefix, _principal(user, format_), format_, f"Godwit{role.capitalize()}{number}")
        made.read(with_versions=terms is not None)
        if role is Role.AGENT:
            _agent(made, terms)
        elif role is Role.RETENTION:
            _retention(made, terms)
        else:
            made.deny("ReadsOnly", ("s3:PutObject", *_DELETE, "s3:PutObjectRetention"))
            made.deny_bucket("KeepBucket", _BUCKET_WIDE)
        statements += made.statements
    return {"Version": VERSION, "Statement": statements}


def _principal(user: str, format_: Format) -> str:
    return user if user.startswith("arn:") or format_ == "s3" else _SEAWEEDFS_USER + user


class _Statements:
    """A policy being written."""

    def __init__(self, bucket: str, prefix: str, principal: str, format_: Format, name: str) -> None:
        self._bucket = f"arn:aws:s3:::{bucket}"
        self._root = f"{self._bucket}/{prefix.strip('/')}".rstrip("/") + "/"
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._principal = {"AWS": [principal]}
        self.format = format_
        self._name = name
        self.statements: list[Statement] = []

    def read(self, *, with_versions: bool) -> None:
        """Let everything under the prefix be read and listed."""
        condition = (
            {"StringLike": {"s3:prefix": [f"{self._prefix}*"]}} if self.format == "s3" and self._prefix else None
        )
        listing = ("s3:ListBucket", *(("s3:ListBucketVersions",) if with_versions else ()))
        reading = ("s3:GetObject", *(("s3:GetObjectVersion", "s3:GetObjectRetention") if with_versions else ()))
        self._add("List", "Allow", listing, [self._bucket], condition)
        self.allow("Read", reading, ["*"])

    def allow(self, name: str, actions: Iterable[str], patterns: Iterable[str]) -> None:
        """Let something be done to the objects of some patterns."""
        self._add(name, "Allow", actions, self._resources(patterns))

    def deny(
        self,
        name: str,
        actions: Iterable[str],
        patterns: Iterable[str] = ("*",),
        condition: Statement | None = None,
    ) -> None:
        """Forbid something, whatever else allows it."""
        self._add(name, "Deny", actions, self._resources(patterns), condition)

    def deny_bucket(self, name: str, actions: Iterable[str]) -> None:
        """Forbid something that concerns the bucket as a whole."""
        self._add(name, "Deny", actions, [self._bucket])

    def _resources(self, patterns: Iterable[str]) -> list[str]:
        return [self._root + pattern for pattern in patterns]

    def _add(
        self, name: str, effect: str, actions: Iterable[str], resources: list[str], condition: Statement | None = None
    ) -> None:
        statement: Statement = {
            "Sid": self._name + name,
            "Effect": effect,
            "Principal": self._principal,
            "Action": list(actions),
            "Resource": resources,
        }
        if condition is not None:
            statement["Condition"] = condition
        self.statements.append(statement)


_BUCKET_WIDE: Final = (
    "s3:PutBucketPolicy",
    "s3:DeleteBucketPolicy",
    "s3:PutBucketVersioning",
    "s3:PutLifecycleConfiguration",
    "s3:PutBucketObjectLockConfiguration",
    "s3:DeleteBucket",
)


def _agent(made: _Statements, terms: Terms | None) -> None:
    added = (*keys.ADDED_BY_AGENTS, keys.HOLDS, keys.EVENTS, keys.CHANGES, keys.PLAN_RUNS, keys.PLAN_JOURNALS)
    made.allow("Add", ("s3:PutObject", *(("s3:PutObjectRetention",) if terms else ())), added)
    made.allow("Lease", ("s3:PutObject",), keys.REPLACED)
    made.deny("Keep", (*_DELETE, "s3:BypassGovernanceRetention"))
    made.deny_bucket("KeepBucket", _BUCKET_WIDE)
    if made.format == "s3":
        _hold_to_conditions(made, added)
        if terms is not None:
            days = -(-terms.period * 3 // 2).days + 1
            made.deny(
                "LockNoLonger",
                ("s3:PutObject", "s3:PutObjectRetention"),
                condition={"NumericGreaterThan": {"s3:object-lock-remaining-retention-days": str(days)}},
            )


def _hold_to_conditions(made: _Statements, added: Iterable[str]) -> None:
    """Take writes without their condition for what they are: overwriting."""
    made.deny("CreateOnly", ("s3:PutObject",), added, {"Null": {"s3:if-none-match": "true"}})
    made.deny(
        "SwapOnly",
        ("s3:PutObject",),
        keys.REPLACED,
        {"Null": {"s3:if-none-match": "true", "s3:if-match": "true"}},
    )


def _retention(made: _Statements, terms: Terms | None) -> None:
    # Maps and segments too: thin segments are rewritten by whoever collects garbage.
    written = (
        "tenants/*/vms/*/manifests/*.json",
        "tenants/*/vms/*/maps/*",
        "tenants/*/vms/*/segments/*",
        keys.PINS,
        keys.CONDEMNED,
        keys.HOLDS,
        keys.EVENTS,
        keys.HISTORIES,
        keys.CHANGES,
    )
    deleted = (
        "tenants/*/vms/*/manifests/*.json",
        "tenants/*/vms/*/maps/*",
        "tenants/*/vms/*/segments/*",
        keys.PINS,
        keys.CONDEMNED,
        keys.HOLDS,
        keys.DIGESTS,
        keys.CHANGES,
        keys.PLAN_RUNS,
        keys.PLAN_JOURNALS,
    )
    made.allow("Write", ("s3:PutObject",), written)
    made.allow("Lease", ("s3:PutObject",), [keys.LEASES])
    made.allow("Delete", _DELETE, deleted)
    if terms is not None:
        made.allow("Prolong", _LOCK, keys.LASTING)
    made.deny_bucket("KeepBucket", _BUCKET_WIDE)
    if made.format == "s3":
        _hold_to_conditions(made, written)
