"""What an S3 server's answer means that is an error: one of the store's errors, and what a person can do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from replica.errors import (
    ObjectChangedError,
    ObjectExistsError,
    ObjectMissingError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
    StoreUnavailableError,
)
from replica.stores.busy import StoreBusyError

_PASSING_CODES: Final = frozenset(
    {"RequestTimeout", "BadDigest", "IncompleteBody", "InternalError", "ConditionalRequestConflict", "OperationAborted"}
)
_BUSY_CODES: Final = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "ServiceUnavailable"}
)
_FULL_CODES: Final = frozenset(
    {"QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "InsufficientStorage", "NoSpaceLeft"}
)
_REFUSED_HINTS: Final[Mapping[str, str]] = {
    "AccessDenied": "allow s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket to these credentials",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID, and that it belongs to this endpoint",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY, and that the endpoint is written as its owner does",
    "ExpiredToken": "renew the session credentials",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "name the bucket's region with ?region=REGION",
    "AuthorizationHeaderMalformed": "name the bucket's region with ?region=REGION",
    "NotImplemented": "choose a store that has conditional writes (AWS S3, MinIO, SeaweedFS, Cloudflare R2, Ceph)",
}
_FULL_HINT: Final = "free some space in the store, or raise its quota"


class RangeOutsideError(StoreError):
    """The server answered 416: the range begins where the object has ended."""


_OBJECT_ANSWERS: Final[Mapping[int, tuple[type[StoreError], str]]] = {
    404: (ObjectMissingError, "no such object"),
    412: (ObjectChangedError, "the object was changed by another"),
    416: (RangeOutsideError, "the range lies outside the object"),
}


def _kind_of_answer(status: int, code: str) -> type[StoreError]:
    if status == 507 or code in _FULL_CODES:
        return StoreFullError
    if status in (301, 401, 403, 501) or code in _REFUSED_HINTS:
        return StoreRefusedError
    if status == 429 or code in _BUSY_CODES:
        return StoreBusyError
    if status >= 500 or code in _PASSING_CODES:
        return StoreUnavailableError
    return StoreError


def answer_error(details: Mapping[str, Any], key: str, operation: str, url: str) -> StoreError | None:
    """Return the error for what the server at ``url`` answered, as botocore parsed it; None: there is no bucket."""
    code = str(details.get("Error", {}).get("Code", ""))
    status = int(details.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return None
    if status in _OBJECT_ANSWERS:
        kind, reason = _OBJECT_ANSWERS[status]
        if status == 412 and operation == "create the object":
            kind, reason = ObjectExistsError, "the object exists already"
        return kind(reason, key=key)
    message = details.get("Error", {}).get("Message", "")
    reason = f"cannot {operation}: {url} answered {status} {code}: {message}"
    kind = _kind_of_answer(status, code)
    if kind is StoreBusyError:
        return StoreBusyError(reason, key=key or None, retry_after_seconds=_retry_after(details))
    hint = None
    if kind is StoreFullError:
        hint = _FULL_HINT
    elif kind is StoreRefusedError:
        hint = _REFUSED_HINTS.get(code, _REFUSED_HINTS["AccessDenied"])
    return kind(reason, key=key or None, hint=hint)


def _retry_after(details: Mapping[str, Any]) -> float | None:
    """Return what the answer's Retry-After says in seconds; its form as a date is not used by stores."""
    value = details.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    return float(value) if str(value).isdigit() else None
