"""The versions that a bucket with Object Lock keeps of an object: found, told apart, locked and deleted by their ids.

The client comes from ``replica.stores.s3``, the one module that knows boto3, and so do the errors of its calls.

In such a bucket a plain DELETE removes nothing: it puts a marker over the object. And whoever may write can put another
version over it, unless a policy forbids it. What was written first stays below for as long as it is locked. Since
every object but a lease is written once, the first version is the right one, whatever came later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from replica.errors import (
    ConfigurationError,
    NoStoreError,
    ObjectLockedError,
    StoreError,
    StoreRefusedError,
)

MODE: Final = "COMPLIANCE"  # the mode that nobody can lift, the account's owner included
TRIAL: Final = timedelta(minutes=1)  # that a lock holds is tried out on an object that stays locked for so long

_HINT: Final = (
    "make a bucket with Object Lock (aws s3api create-bucket --object-lock-enabled-for-bucket); not "
    "every server can add it to a bucket later"
)


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object, by the bucket's own key. A marker hides those before it."""

    name: str
    version_id: str
    size: int
    tag: str
    is_marker: bool
    is_latest: bool


class Versions:
    """The versions in one bucket. ``translated`` takes a key and what is done, and gives errors their meaning."""

    def __init__(
        self, client: Any, bucket: str, translated: Callable[[str, str], AbstractContextManager[None]]
    ) -> None:
        self._client = client
        self._bucket = bucket
        self._translated = translated

    def check_bucket(self) -> None:
        """Raise ConfigurationError where the bucket has no Object Lock."""
        try:
            with self._translated("", "look for the bucket's Object Lock"):
                answer = self._client.get_object_lock_configuration(Bucket=self._bucket)
        except StoreError as error:
            if isinstance(error, StoreRefusedError | NoStoreError) or error.retryable:
                raise
            raise ConfigurationError(f"the bucket {self._bucket!r} has no Object Lock", hint=_HINT) from error
        if answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") != "Enabled":
            raise ConfigurationError(f"the bucket {self._bucket!r} has no Object Lock", hint=_HINT)

    def listed(self, prefix: str) -> Iterator[Version]:
        """Yield the versions of what begins with ``prefix``; those of one object newest first."""
        request: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix}
        while True:
            with self._translated("", "list the versions"):
                page = self._client.list_object_versions(**request)
            rows = [(entry, False) for entry in page.get("Versions", [])]
            rows += [(entry, True) for entry in page.get("DeleteMarkers", [])]
            # Versions and markers come apart. Where the latest is known the order of the rest is that of their times.
            rows.sort(key=lambda row: (row[0]["IsLatest"], row[0]["LastModified"]), reverse=True)
            for entry, is_marker in rows:
                yield Version(
                    entry["Key"],
                    entry["VersionId"],
                    entry.get("Size", 0),
                    entry.get("ETag", ""),
                    is_marker,
                    entry["IsLatest"],
                )
            if not page.get("IsTruncated"):
                return
            request["KeyMarker"] = page["NextKeyMarker"]
            request["VersionIdMarker"] = page["NextVersionIdMarker"]

    def of(self, name: str) -> list[Version]:
        """Return the versions of one object, newest first."""
        return [one for one in self.listed(name) if one.name == name]

    def first(self, name: str) -> Version | None:
        """Return what was written first under a name, or None where there is nothing."""
        return self.firsts(name).get(name)

    def last(self, name: str) -> Version | None:
        """Return what was written last under a name, whether hidden since or not."""
        return next((one for one in self.of(name) if not one.is_marker), None)

    def firsts(self, prefix: str) -> dict[str, Version]:
        """Return by name what was written first under each name that begins with ``prefix``."""
        return {one.name: one for one in self.listed(prefix) if not one.is_marker}

    def delete_all(self, key: str, name: str) -> None:
        """Delete every version of an object, the first one first. Raises ObjectLockedError before anything is deleted.

        ``key`` is the object's key in the store.
        """
        for version in reversed(self.of(name)):
            try:
                with self._translated(key, "delete the object"):
                    self._client.delete_object(Bucket=self._bucket, Key=name, VersionId=version.version_id)
            except StoreRefusedError as error:
                until = None if version.is_marker else self.locked_until(key, name, version.version_id)
                if until is None or until <= datetime.now(UTC):
                    raise
                raise ObjectLockedError(f"locked until {until:%Y-%m-%d %H:%M:%S} UTC", key=key, until=until) from error

    def locked_until(self, key: str, name: str, version_id: str | None = None) -> datetime | None:
        """Return until when a version is locked, the latest one by default; None where it is not."""
        options = {} if version_id is None else {"VersionId": version_id}
        with self._translated(key, "look at the object"):
            answer = self._client.head_object(Bucket=self._bucket, Key=name, **options)
        until = answer.get("ObjectLockRetainUntilDate")
        return until.astimezone(UTC) if answer.get("ObjectLockMode") == MODE and isinstance(until, datetime) else None

    def lock(self, key: str, name: str, version_id: str, until: datetime) -> None:
        """Lock a version until then."""
        with self._translated(key, "lock the object"):
            self._client.put_object_retention(
                Bucket=self._bucket,
                Key=name,
                VersionId=version_id,
                Retention={"Mode": MODE, "RetainUntilDate": until},
            )


def lock_options(until: datetime | None) -> dict[str, Any]:
    """Return what a PUT carries so that the object is locked until then."""
    return {} if until is None else {"ObjectLockMode": MODE, "ObjectLockRetainUntilDate": until}
