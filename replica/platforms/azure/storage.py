"""Azure's blobs: the one module that imports azure-storage-blob, and turns its errors into ours.

Credentials come by the environment, and are in no message: addresses are told without their query.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.storage.blob import BlobClient, BlobLeaseClient, BlobType, ContainerClient, ContentSettings

from replica.errors import GodwitError, PlatformError
from replica.platforms.azure.settings import Container
from replica.platforms.azure.target import BlobHeldError, BlobLostError, BlobState, BlobUnreachableError

CONNECTION_STRING: Final = "AZURE_STORAGE_CONNECTION_STRING"
SAS_TOKEN: Final = "AZURE_STORAGE_SAS_TOKEN"
KEY: Final = "AZURE_STORAGE_KEY"
RETRIES: Final = 4  # of a request, with growing pauses between them
TIMEOUT_SECONDS: Final = 60
LARGEST_LISTING: Final = 10_000
RANGES_PER_ANSWER: Final = 10_000

_QUERY = re.compile(r"\?[^\s'\")]*")
_KEYS_HINT: Final = f"set {CONNECTION_STRING}, {SAS_TOKEN} or {KEY}, or sign in and install azure-identity"


class Blobs:
    """A container, as far as recovery machines need it. Everything raises PlatformError."""

    def __init__(self, container: Container, environment: Mapping[str, str]) -> None:
        """Prepare to speak to the container; nothing is asked yet. Raises PlatformError without credentials."""
        self._place = container
        credential = _credential(container, environment)
        self._client = ContainerClient.from_container_url(
            container.url,
            credential=credential,
            retry_total=RETRIES,
            connection_timeout=TIMEOUT_SECONDS,
            read_timeout=TIMEOUT_SECONDS,
        )

    def check(self) -> None:
        """Ask whether the container is there and is to be read with these credentials."""
        with _told(self._place.url, "look at the container"):
            next(iter(self._client.list_blobs(results_per_page=1)), None)

    def list(self, prefix: str) -> list[BlobState]:
        """Return the blobs whose names begin so. Raises PlatformError where they are too many to be one machine's."""
        found: list[BlobState] = []
        with _told(self._place.url, "list the blobs"):
            for one in self._client.list_blobs(name_starts_with=prefix, include=["metadata"]):
                if len(found) == LARGEST_LISTING:
                    raise PlatformError("there are too many blobs of one machine", path=self._place.url)
                is_page_blob = one.blob_type is BlobType.PAGEBLOB
                found.append(BlobState(one.name, one.size, dict(one.metadata or {}), is_page_blob))
        return found

    def blob(self, name: str) -> AzurePageBlob:
        """Return the blob of that name, there or not."""
        return AzurePageBlob(self._client.get_blob_client(name), f"{self._place.url}/{name}")

    def close(self) -> None:
        """End the connections."""
        self._client.close()


class AzurePageBlob:
    """See ``replica.platforms.azure.target.PageBlob`` for the contract."""

    def __init__(self, client: BlobClient, url: str) -> None:
        self._client = client
        self._url = url

    @property
    def url(self) -> str:
        """Its address, without credentials."""
        return self._url

    def look(self) -> BlobState | None:
        """Return what it is, None where there is none."""
        with _told(self._url, "look at the blob"):
            try:
                found = self._client.get_blob_properties()
            except ResourceNotFoundError as error:
                if _code(error) == "ContainerNotFound":
                    raise
                return None
        is_page_blob = found.blob_type is BlobType.PAGEBLOB
        return BlobState(str(found.name), int(found.size), dict(found.metadata or {}), is_page_blob)

    def create(self, size: int, metadata: Mapping[str, str]) -> bool:
        """Make it, of ``size`` bytes that are zero; False where there is one of the name."""
        with _told(self._url, "make the blob"):
            try:
                self._client.create_page_blob(
                    size,
                    content_settings=ContentSettings(content_type="application/octet-stream"),
                    metadata=dict(metadata),
                    match_condition=MatchConditions.IfMissing,
                )
            except ResourceExistsError as error:
                if _code(error) in ("BlobAlreadyExists", "UnauthorizedBlobOverwrite"):
                    return False
                raise
            except HttpResponseError as error:
                if error.status_code in (409, 412) and _code(error) != "ContainerBeingDeleted":
                    return False  # it exists, and is leased besides
                raise
        return True

    def acquire(self, lease: str, seconds: int) -> None:
        """Let nobody else change it. Whoever has the lease of that id already has it anew. Raises BlobHeldError."""
        with _told(self._url, "take the blob's lease"):
            try:
                BlobLeaseClient(self._client, lease).acquire(lease_duration=seconds)
            except HttpResponseError as error:
                if error.status_code in (409, 412) and (_code(error) or "").startswith("Lease"):
                    raise BlobHeldError(
                        "somebody else uploads to this blob, or did a minute ago",
                        path=self._url,
                        hint="try again once that has ended",
                    ) from error
                raise

    def renew(self, lease: str) -> None:
        """Hold it on. Raises BlobLostError."""
        with _told(self._url, "hold the blob's lease"):
            BlobLeaseClient(self._client, lease).renew()

    def release(self, lease: str) -> None:
        """Let others change it. Raises BlobLostError."""
        with _told(self._url, "give the blob's lease back"):
            BlobLeaseClient(self._client, lease).release()

    def put(self, lease: str, offset: int, data: bytes) -> None:
        """Write whole pages, which the service compares with a hash that goes along. Raises BlobLostError."""
        with _told(self._url, f"write at {offset}"):
            self._client.upload_page(data, offset, len(data), lease=lease, validate_content="md5")

    def note(self, lease: str, metadata: Mapping[str, str]) -> None:
        """Replace what is noted with it. Raises BlobLostError."""
        with _told(self._url, "note how far it is"):
            self._client.set_blob_metadata(dict(metadata), lease=lease)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the half-open ranges of pages that were written, in order."""
        start = end = 0
        with _told(self._url, "list its pages"):
            for one in self._client.list_page_ranges(results_per_page=RANGES_PER_ANSWER):
                if one.cleared or one.start is None or one.end is None:
                    continue
                if one.start != end and start < end:
                    yield start, end
                start, end = one.start if one.start != end else start, one.end + 1
        if start < end:
            yield start, end

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of it."""
        with _told(self._url, f"read at {offset}"):
            return bytes(self._client.download_blob(offset, length, max_concurrency=1).readall())

    def delete(self) -> None:
        """Remove it, whoever has a lease; nothing where it is gone."""
        with _told(self._url, "remove the blob"):
            try:
                BlobLeaseClient(self._client).break_lease(lease_break_period=0)
            except ResourceNotFoundError as error:
                if _code(error) == "ContainerNotFound":
                    raise
                return
            except HttpResponseError as error:
                if error.status_code != 409:  # it has none
                    raise
            try:
                self._client.delete_blob(delete_snapshots="include")
            except ResourceNotFoundError:
                return


def _credential(container: Container, environment: Mapping[str, str]) -> Any:
    """Return what the library takes for credentials. Raises PlatformError."""
    connection = environment.get(CONNECTION_STRING)
    if connection:
        parts = dict(one.partition("=")[::2] for one in connection.split(";") if one)
        given = {name.strip().lower(): value for name, value in parts.items()}
        account = given.get("accountname")
        if account is not None and account != container.account:
            raise PlatformError(
                f"{CONNECTION_STRING} is of the account {account}, and the container is in {container.account}",
                path=container.url,
                hint=f"set the one of {container.account}",
            )
        if given.get("accountkey"):
            return {"account_name": container.account, "account_key": given["accountkey"]}
        if given.get("sharedaccesssignature"):
            return given["sharedaccesssignature"]
        raise PlatformError(f"{CONNECTION_STRING} has neither AccountKey nor SharedAccessSignature", hint=_KEYS_HINT)
    if environment.get(SAS_TOKEN):
        return environment[SAS_TOKEN]
    if environment.get(KEY):
        return {"account_name": container.account, "account_key": environment[KEY]}
    try:
        identity: Any = importlib.import_module("azure.identity")
    except ImportError:
        raise PlatformError("no credentials of the storage account were given", hint=_KEYS_HINT) from None
    return identity.DefaultAzureCredential()


@contextmanager
def _told(url: str, operation: str) -> Iterator[None]:
    """Raise what goes wrong as ours."""
    try:
        yield
    except ClientAuthenticationError as error:
        raise _denied(url, operation, error) from None
    except (ServiceRequestError, ServiceResponseError) as error:
        raise BlobUnreachableError(
            f"cannot {operation}: the service does not answer: {_short(error)}",
            path=url,
            hint="look at the network; what was uploaded is kept, and the same command goes on",
        ) from None
    except HttpResponseError as error:
        raise _answered(url, operation, error) from None
    except (AzureError, ValueError) as error:  # ValueError: a key that is no base64
        raise PlatformError(f"cannot {operation}: {_short(error)}", path=url) from None


def _answered(url: str, operation: str, error: HttpResponseError) -> GodwitError:
    """Return our error for an answer of the service."""
    code = _code(error) or ""
    status = error.status_code or 0
    if status == 403:
        return _denied(url, operation, error)
    if code == "ContainerNotFound":
        return PlatformError("there is no such container", path=url, hint="make it: az storage container create")
    if status == 412 or code.startswith("Lease"):
        return BlobLostError(f"cannot {operation}: somebody else has the blob by now ({code or status})", path=url)
    if status == 404:
        return BlobLostError(f"cannot {operation}: the blob is gone", path=url)
    if status >= 500 or status in (408, 429):
        return BlobUnreachableError(
            f"cannot {operation}: the service is busy ({code or status})",
            path=url,
            hint="the same command goes on where this one ended",
        )
    return PlatformError(f"cannot {operation}: {_short(error)}", path=url)


def _denied(url: str, operation: str, error: HttpResponseError) -> PlatformError:
    return PlatformError(
        f"cannot {operation}: access is denied ({_code(error) or error.status_code})",
        path=url,
        hint=f"check the credentials, what they permit and until when: {_KEYS_HINT}",
    )


def _code(error: HttpResponseError) -> str | None:
    code = getattr(error, "error_code", None)
    return None if code is None else str(getattr(code, "value", code))


def _short(error: Exception) -> str:
    """Return the first line of what an error says, without the queries of addresses: signatures are there."""
    text = str(getattr(error, "message", None) or error).strip()
    lines = text.splitlines()
    return _QUERY.sub("?…", lines[0])[:300] if lines else type(error).__name__
