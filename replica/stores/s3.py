"""The store in an S3 bucket. The one module that imports boto3; it is imported only when an S3 store is opened.

A create is a PUT with ``If-None-Match: *``, a replacement a PUT with ``If-Match`` and the ETag, which is the tag.
Retries are left to ``ResilientStore``: botocore would repeat a PUT that was applied and take the 412 for an answer.

Uploads carry their CRC-32C, which AWS and most others check before they accept an object; it costs a fifteenth of
what MD5 does. A server that does not hand it back in its answer did not look at it: that upload is then compared
with its ETag, and from the next one on an MD5 goes along, which all servers check.

Listings of AWS come in key order. Servers that keep objects in folders list ``a/b`` before ``a-b``; such a bucket is
listed folder by folder and each folder sorted here (``listing="folders"``; known servers are recognised, and one that
is not and lists out of order is refused).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import secrets
import ssl
import struct
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, TypeAlias

import boto3
import botocore.exceptions as failures
import google_crc32c
from botocore.config import Config
from botocore.parsers import ResponseParserError

from replica import keys, locking, record
from replica.errors import (
    ConfigurationError,
    GodwitError,
    NoStoreError,
    ObjectChangedError,
    ObjectLockedError,
    ObjectMissingError,
    StoreError,
    StoreRefusedError,
    StoreUnavailableError,
    UsageError,
)
from replica.stores.answers import RangeOutsideError, answer_error
from replica.stores.key import check_key, check_prefix
from replica.stores.store import ObjectData, ObjectInfo
from replica.stores.versions import TRIAL, Versions, lock_options

Checksum: TypeAlias = Literal["crc32c", "md5"]
Listing: TypeAlias = Literal["flat", "folders"]
Reading: TypeAlias = Literal["latest", "first"]

CONNECT_LIMIT_SECONDS: Final = 10
READ_LIMIT_SECONDS: Final = 60
DEFAULT_REGION: Final = "us-east-1"

_CONFIGURATION_FAILURES: Final = (
    failures.NoCredentialsError,
    failures.PartialCredentialsError,
    failures.CredentialRetrievalError,
    failures.TokenRetrievalError,
    failures.NoRegionError,
    failures.ProfileNotFound,
    failures.ConfigParseError,
    failures.ParamValidationError,
    failures.InvalidRegionError,
    failures.UnknownEndpointError,
)
_PASSING_FAILURES: Final = (
    failures.HTTPClientError,
    failures.ConnectionError,
    failures.IncompleteReadError,
    failures.ResponseStreamingError,
    failures.ReadTimeoutError,
)
_CREDENTIALS_HINT: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws/credentials with ?profile=NAME"
)
_FOLDER_SERVERS: Final = ("SeaweedFS",)
_ETAG: Final = re.compile(r'"[^",*\s]+"|[^",*\s]+')
_MD5_ETAG: Final = re.compile(r'"?([0-9a-f]{32})"?')


class S3Store:
    """Objects in ``bucket`` under ``prefix``. One client serves all threads, with a connection for each of ``workers``.

    ``endpoint`` is another server's URL (AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL name it too); its buckets are
    addressed by path unless ``path_style`` says otherwise. ``region`` falls back to AWS_REGION, AWS_DEFAULT_REGION and
    the profile's. Nothing is asked of the server before the first call. Raises ConfigurationError.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str | None = None,
        path_style: bool | None = None,
        profile: str | None = None,
        checksum: Checksum = "crc32c",
        listing: Listing | None = None,
        versions: Reading = "latest",
        page_size: int = 1000,
        workers: int = 8,
        url: str | None = None,
    ) -> None:
        self._bucket = bucket
        self._prefix = check_key(prefix.strip("/")) + "/" if prefix.strip("/") else ""
        self._url = url or f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._checksum: Checksum = checksum
        self._listing: Listing | None = listing
        self._page_size = page_size
        self._bucket_seen = False
        self._reads_first = versions == "first"
        self._terms: list[locking.Terms | None] = []  # once the store's record was read
        self._skew_seconds: float | None = None
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
        by_path = path_style if path_style is not None else endpoint is not None
        config = Config(
            connect_timeout=CONNECT_LIMIT_SECONDS,
            read_timeout=READ_LIMIT_SECONDS,
            max_pool_connections=max(1, workers),
            tcp_keepalive=True,
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": "path" if by_path else "auto"},
            # What botocore would add by itself travels in a framing that many servers do not know.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            session = boto3.session.Session(profile_name=profile)
            region = region or os.environ.get("AWS_REGION") or session.region_name or DEFAULT_REGION
            self._client: Any = session.client("s3", region_name=region, endpoint_url=endpoint, config=config)
        except (failures.BotoCoreError, ValueError) as error:
            raise ConfigurationError(f"cannot use the S3 store {self._url}: {error}") from error
        self._versions = Versions(self._client, bucket, self._translated)

    @property
    def url(self) -> str:
        """The address as given; it never holds credentials."""
        return self._url

    @property
    def skew_seconds(self) -> float | None:
        """This machine's clock less the server's, by its newest answer to a GET; None before the first."""
        return self._skew_seconds

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Return the object's bytes or a range of them; see ``Store.get``."""
        if start == 0 and length is None:
            return self.get_tagged(key)[0]
        if length == 0:
            self.head(key)
            return b""
        if start < 0:
            return self._tail(key, -start, length)
        last = "" if length is None else str(start + length - 1)
        return self._get_range(key, f"bytes={start}-{last}", start, length)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the whole object and its ETag; see ``Store.get_tagged``."""
        data, tag, _ = self._read(key)
        return data, tag

    def head(self, key: str) -> ObjectInfo:
        """Return size and ETag; see ``Store.head``."""
        try:
            with self._translated(key, "look at the object"):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._name(key), **self._version(key))
        except ObjectMissingError:
            self._check_bucket()  # the answer to a HEAD does not say which of the two is missing
            raise
        return ObjectInfo(key, answer["ContentLength"], self._tag_of(answer, key))

    def create(self, key: str, data: ObjectData) -> str:
        """Write the object if none exists; see ``Store.create``."""
        return self._put(key, data, "create the object", {"IfNoneMatch": "*"}, self._locked_from_now(key, data))

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Write the object if its ETag still is ``tag``; see ``Store.replace``."""
        if not _ETAG.fullmatch(tag):
            # Servers take an empty condition for none, and '*' and lists for more than one version.
            self.head(key)
            raise ObjectChangedError(f"{tag!r} is not the tag of any version", key=key)
        try:
            return self._put(key, data, "replace the object", {"IfMatch": tag}, self._locked_from_now(key, data))
        except ObjectChangedError:
            self.head(key)  # some servers answer the same whether the object was changed or is gone
            raise

    def delete(self, key: str) -> None:
        """Remove the object if it is there; see ``Store.delete``. Raises ObjectLockedError too."""
        if self._locks(key) is not None:
            self._versions.delete_all(key, self._name(key))
            return
        with contextlib.suppress(ObjectMissingError), self._translated(key, "delete the object"):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects in key order; see ``Store.list``. Memory: a page, or the largest folder (see module)."""
        check_prefix(prefix)
        if self._reads_first:
            return self._list_first(prefix, start_after)
        if self._listing is None:
            with self._translated(prefix, "list the objects"):
                answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            server = answer["ResponseMetadata"]["HTTPHeaders"].get("server", "")
            self._listing = "folders" if server.startswith(_FOLDER_SERVERS) else "flat"
        if self._listing == "folders":
            return self._walk(prefix[: prefix.rfind("/") + 1], prefix, start_after)
        return self._list_flat(prefix, start_after)

    def check_locks(self) -> None:
        """Try out on an object that a lock holds; see ``LockingStore``. It stays for a minute and is left there."""
        self._versions.check_bucket()
        key = f"godwit-probe/{secrets.token_hex(8)}-locked"
        until = datetime.now(UTC) + TRIAL
        self._put(key, b"locked", "create the object", {"IfNoneMatch": "*"}, until)
        version = self._versions.first(self._name(key))
        with contextlib.suppress(ObjectLockedError):
            self._versions.delete_all(key, self._name(key))
            version = None
        if version is None or self._versions.locked_until(key, self._name(key), version.version_id) is None:
            raise StoreRefusedError(
                f"the bucket {self._bucket!r} has Object Lock, but a locked object could be deleted",
                key=key,
                hint="without a lock that holds, points are not immutable",
            )

    def first_versions(self, prefix: str) -> dict[str, str]:
        """Return what was written first under each key; see ``LockingStore``."""
        found = self._versions.firsts(self._prefix + check_prefix(prefix))
        return {name[len(self._prefix) :]: one.version_id for name, one in found.items()}

    def locked_until(self, key: str, version: str) -> datetime | None:
        """Return until when a version is locked; see ``LockingStore``."""
        return self._versions.locked_until(key, self._name(key), version)

    def lock(self, key: str, version: str, until: datetime) -> None:
        """Lock a version; see ``LockingStore``."""
        self._versions.lock(key, self._name(key), version, until)

    def _locks(self, key: str, data: ObjectData | None = None) -> locking.Terms | None:
        """Return how long the store locks what points need, None where it does not, asking its record once.

        ``data``: ``key`` is about to be created with it.
        """
        if key == keys.STORE and data is not None:
            return locking.decode(record.decode("store", bytes(data), key=key))
        if not self._terms and key.startswith(keys.TENANTS):
            try:
                found = self.get(keys.STORE)
            except ObjectMissingError:  # it is no store yet
                return None
            self._terms = [locking.decode(record.decode("store", found, key=keys.STORE))]
        return self._terms[0] if self._terms else None

    def _locked_from_now(self, key: str, data: ObjectData) -> datetime | None:
        """Return until when an object that is created now is to be locked."""
        terms = self._locks(key, data) if keys.is_lasting(key) else None
        return None if terms is None else terms.lock_until(datetime.now(UTC))

    def _version(self, key: str) -> dict[str, str]:
        """Return the option that names the version to read, where it may not be the latest. Raises ObjectMissingError.

        Of an object that is written once it is the first, whatever was put over it; of one that is replaced the last.
        """
        if not self._reads_first:
            return {}
        once = not any(fnmatchcase(key, pattern) for pattern in keys.REPLACED)
        found = self._versions.first(self._name(key)) if once else self._versions.last(self._name(key))
        if found is None:
            raise ObjectMissingError("no such object", key=key)
        return {"VersionId": found.version_id}

    def _list_first(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        found = self._versions.firsts(self._prefix + prefix)
        for name in sorted(found):
            key = name[len(self._prefix) :]
            if key > start_after and not key.endswith("/"):
                yield ObjectInfo(key, found[name].size, found[name].tag)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _list_flat(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        after = {"StartAfter": self._prefix + start_after} if start_after else {}
        previous = start_after
        for page in self._pages(prefix, after):
            for info in self._objects(page):
                if info.key <= previous:
                    raise StoreRefusedError(
                        f"the store lists keys out of order: this one after {previous}",
                        key=info.key,
                        hint="add ?listing=folders to the store's address",
                    )
                previous = info.key
                yield info

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        """Yield what the listing wants of ``folder`` (empty or with its last slash), sorted here."""
        found: dict[str, ObjectInfo | None] = {}
        for page in self._pages(folder, {"Delimiter": "/"}):
            for info in self._objects(page):
                if info.key.startswith(prefix) and info.key > start_after:
                    found[info.key] = info
            for entry in page.get("CommonPrefixes", []):
                name = entry["Prefix"][len(self._prefix) :]
                if (name.startswith(prefix) or prefix.startswith(name)) and (
                    name > start_after or start_after.startswith(name)
                ):
                    found[name] = None
        for name in sorted(found):
            present = found.pop(name)
            if present is None:
                yield from self._walk(name, prefix, start_after)
            else:
                yield present

    def _pages(self, prefix: str, options: dict[str, str]) -> Iterator[dict[str, Any]]:
        request: dict[str, Any] = {
            "Bucket": self._bucket,
            "Prefix": self._prefix + prefix,
            "MaxKeys": self._page_size,
            **options,
        }
        while True:
            with self._translated(prefix, "list the objects"):
                page = self._client.list_objects_v2(**request)
            if "Name" not in page:  # what is no listing would be taken for an empty one
                raise self._not_s3(prefix)
            yield page
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token:
                return
            request["ContinuationToken"] = token

    def _objects(self, page: dict[str, Any]) -> Iterator[ObjectInfo]:
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # folder markers that other tools make
                yield ObjectInfo(entry["Key"][len(self._prefix) :], entry["Size"], self._tag_of(entry, entry["Key"]))

    def _tail(self, key: str, count: int, length: int | None) -> bytes:
        data = self._get_range(key, f"bytes=-{count}", None, count)
        if length is None:
            return data
        # An object shorter than ``count`` begins at its first byte, as a negative index that reaches too far does.
        return data[:length]

    def _get_range(self, key: str, wanted: str, start: int | None, length: int | None) -> bytes:
        try:
            data, _, status = self._read(key, Range=wanted)
        except RangeOutsideError:
            return b""
        if status != 206:  # a server without ranges sends it all
            return data[start:][:length] if start is not None else data[-(length or 0) :]
        return data

    def _read(self, key: str, **options: str) -> tuple[bytes, str, int]:
        """Return what a GET brings, the ETag and the status."""
        with self._translated(key, "read the object"):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key), **self._version(key), **options)
            self._note_time(answer)
            with contextlib.closing(answer["Body"]) as body:
                data: bytes = body.read()
        tag = self._tag_of(answer, key)
        if len(data) != answer["ContentLength"]:
            raise StoreUnavailableError(f"{len(data)} bytes arrived of {answer['ContentLength']}", key=key)
        return data, tag, answer["ResponseMetadata"]["HTTPStatusCode"]

    def _note_time(self, answer: Mapping[str, Any]) -> None:
        """Take note of the time that the answer was given at: HTTP says it in whole seconds."""
        headers = answer["ResponseMetadata"].get("HTTPHeaders", {})
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            given = parsedate_to_datetime(headers["date"]) if "date" in headers else None
            if given is not None and given.tzinfo is not None:
                self._skew_seconds = (datetime.now(UTC) - given).total_seconds() - 0.5

    def _tag_of(self, answer: Mapping[str, Any], key: str) -> str:
        tag = answer.get("ETag")
        if not isinstance(tag, str):
            raise self._not_s3(key)
        return tag

    def _not_s3(self, key: str) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"{self._url} answered something that is not an answer of S3",
            key=key or None,
            hint="check the endpoint; a proxy or a login page may stand before it",
        )

    def _put(
        self,
        key: str,
        data: ObjectData,
        operation: str,
        condition: dict[str, Any],
        locked_until: datetime | None = None,
    ) -> str:
        if self._reads_first:
            raise UsageError("what is read by its first versions is not written to", hint="leave ?versions=first out")
        content = bytes(data)  # no copy where it is bytes already; botocore takes no memoryview
        checksum = self._checksum
        sums: dict[str, Any]
        if checksum == "crc32c":
            crc = base64.b64encode(struct.pack(">I", google_crc32c.value(content))).decode()
            sums = {"ChecksumCRC32C": crc}
        else:
            crc = ""
            sums = {"ContentMD5": base64.b64encode(_md5(content).digest()).decode()}
        with self._translated(key, operation):
            answer = self._client.put_object(
                Bucket=self._bucket,
                Key=self._name(key),
                Body=content,
                **condition,
                **sums,
                **lock_options(locked_until),
            )
        tag = self._tag_of(answer, key)
        if checksum == "crc32c" and answer.get("ChecksumCRC32C") != crc:
            self._checksum = "md5"
            found = _MD5_ETAG.fullmatch(tag)
            if found and found[1] != _md5(content).hexdigest() and "SSEKMSKeyId" not in answer:
                raise StoreError(
                    "the store holds other bytes than were sent to it",
                    key=key,
                    hint="delete the object; if it happens again, add ?checksum=md5 to the store's address",
                )
        return tag

    def _check_bucket(self) -> None:
        if self._bucket_seen:
            return
        try:
            with self._translated("", "look at the bucket"):
                self._client.head_bucket(Bucket=self._bucket)
        except ObjectMissingError as error:
            raise self._no_bucket() from error
        except StoreRefusedError:
            return  # credentials that may not ask
        self._bucket_seen = True

    def _no_bucket(self) -> NoStoreError:
        return NoStoreError(
            f"{self._url}: there is no bucket {self._bucket!r}",
            hint="create the bucket, or correct its name or endpoint",
        )

    @contextlib.contextmanager
    def _translated(self, key: str, operation: str) -> Iterator[None]:
        """Turn botocore's errors into the store's."""
        try:
            yield
        except failures.ClientError as error:
            raise self._answer_error(error.response, key, operation) from error
        except ResponseParserError as error:
            raise self._not_s3(key) from error
        except failures.BotoCoreError as error:
            raise self._failure_error(error, key, operation) from error

    def _answer_error(self, details: Mapping[str, Any], key: str, operation: str) -> GodwitError:
        """Return the error for what the server answered."""
        return answer_error(details, key, operation, self._url) or self._no_bucket()

    def _failure_error(self, error: failures.BotoCoreError, key: str, operation: str) -> GodwitError:
        """Return the error for a request that got no answer."""
        reason = f"cannot {operation} in {self._url}: {error}"
        if isinstance(error, _CONFIGURATION_FAILURES):
            return ConfigurationError(reason, hint=_CREDENTIALS_HINT)
        if isinstance(error, failures.SSLError) and _is_certificate_trouble(error):
            hint = "check the endpoint's name, and name its certificate authority with AWS_CA_BUNDLE"
            return StoreRefusedError(reason, key=key or None, hint=hint)
        if isinstance(error, _PASSING_FAILURES):
            hint = "check the endpoint and the network"
            return StoreUnavailableError(reason, key=key or None, hint=hint)
        return StoreError(reason, key=key or None)


def _md5(content: bytes) -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)


def _is_certificate_trouble(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error)
