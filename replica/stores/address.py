"""Store addresses: what a user may write, and which store it opens."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from replica.errors import ConfigurationError, NoStoreError, UsageError
from replica.stores.file import FileStore
from replica.stores.memory import MemoryStore
from replica.stores.retry import Patience, ResilientStore
from replica.stores.store import Store

ACCEPTED: Final = (
    "write file:///folder, a folder's path, or s3://bucket/prefix"
    " (for a server that is not AWS: s3://bucket/prefix?endpoint=https://host:port)"
)
S3_OPTIONS: Final = ("endpoint", "region", "path_style", "profile", "checksum", "listing", "versions")

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C: is a drive
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_YES_OR_NO: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

_memory_stores: dict[str, MemoryStore] = {}


def open_store(
    url: str,
    *,
    create: bool = False,
    workers: int = 8,
    patience: Patience | None = None,
    around: Callable[[Store], Store] | None = None,
    **injected: Callable[..., Any],
) -> ResilientStore:
    """Open the store at ``url``, with retries around it.

    ``file:///folder`` or a path: the folder must hold a store; with ``create`` it is made one. ``s3://bucket/prefix``
    with ``endpoint``, ``region``, ``path_style`` (1 or 0), ``profile``, ``checksum`` (crc32c or md5), ``listing``
    (flat or folders) and ``versions`` (latest or first) after a question mark; the bucket must exist, and nothing is
    asked of it yet. ``memory:NAME``, for tests, is the same store each time in one process. ``workers`` is how many
    threads will use it; ``around`` puts a store of its own around the bare one, below the retries; ``injected`` goes to
    ResilientStore (sleep, clock, chance). Raises ConfigurationError, NoStoreError and other StoreErrors.
    """
    bare = _open_bare(url, create=create, workers=workers)
    return ResilientStore(around(bare) if around else bare, patience, **injected)


def bucket_of(url: str) -> tuple[str, str]:
    """Return bucket and prefix of an S3 store's address. Raises ConfigurationError for any other's."""
    parts = urlsplit(url)
    if parts.scheme.lower() != "s3":
        raise ConfigurationError(f"{_without_user(url)!r} is no bucket", hint="s3://bucket/prefix is one")
    return parts.netloc, unquote(parts.path).strip("/")


def _open_bare(url: str, *, create: bool, workers: int) -> Store:
    if not url.strip():
        raise NoStoreError("no store was given", hint=f"with --store, GODWIT_STORE or godwit.toml: {ACCEPTED}")
    found = _SCHEME.match(url)
    scheme = found[1].lower() if found else ""
    if not scheme:
        return FileStore(Path(url).expanduser(), create=create)
    if scheme == "file":
        return FileStore(_folder_of(url), create=create)
    if scheme == "s3":
        return _open_s3(url, workers)
    if scheme == "memory":
        name = url.partition(":")[2]
        return _memory_stores.setdefault(name, MemoryStore(name))
    hint = ACCEPTED
    if scheme in ("http", "https"):
        hint = f"an S3 server is named beside its bucket: s3://bucket/prefix?endpoint={_without_user(url)}"
    raise ConfigurationError(f"{_without_user(url)!r} is not the address of a store: {scheme}: is not known", hint=hint)


def _folder_of(url: str) -> Path:
    parts = urlsplit(url)
    if not url[5:].startswith("//") or parts.netloc not in ("", "localhost") or len(parts.path) < 2:
        raise ConfigurationError(
            f"{url!r} does not name a folder of this machine",
            hint="a file address has three slashes and a whole path, as in file:///srv/godwit; or write the path alone",
        )
    if parts.query or parts.fragment:
        raise ConfigurationError(f"{url!r} has something after the path", hint="write ? and # of a path as %3F and %23")
    path = unquote(parts.path)
    return Path(path[1:] if sys.platform == "win32" else path)  # /C:/folder


def _open_s3(url: str, workers: int) -> Store:
    parts = urlsplit(url)
    shown = _without_user(url)
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"{shown!r} was given with credentials in it",
            hint="addresses end up in logs: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use ?profile=NAME",
        )
    if not url[3:].startswith("//") or not _BUCKET.fullmatch(parts.netloc) or parts.fragment:
        raise ConfigurationError(f"{shown!r} does not name a bucket", hint=ACCEPTED)
    options = _s3_options(shown, parts.query)
    from replica.stores.s3 import S3Store  # noqa: PLC0415 - boto3 takes longer to import than most commands to run

    try:
        return S3Store(parts.netloc, unquote(parts.path), workers=workers, url=url, **options)
    except UsageError as error:
        raise ConfigurationError(f"{shown!r}: {error}", hint=ACCEPTED) from error


def _s3_options(shown: str, query: str) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigurationError(f"{shown!r}: {query!r} is not NAME=VALUE", hint=_options_hint()) from error
    options: dict[str, Any] = dict(pairs)
    unknown = sorted(set(options) - set(S3_OPTIONS))
    if unknown or len(options) != len(pairs):
        problem = f"there is no option {unknown[0]!r}" if unknown else "an option is given twice"
        raise ConfigurationError(f"{shown!r}: {problem}", hint=_options_hint())
    endpoint = options.get("endpoint")
    if endpoint is not None:
        split = urlsplit(endpoint)
        if split.scheme not in ("http", "https") or not split.hostname or "@" in split.netloc:
            raise ConfigurationError(
                f"{shown!r}: the endpoint is not http://host:port or https://host:port without credentials",
                hint=_options_hint(),
            )
    choices = (("checksum", ("crc32c", "md5")), ("listing", ("flat", "folders")), ("versions", ("latest", "first")))
    for name, accepted in choices:
        if options.get(name, accepted[0]) not in accepted:
            raise ConfigurationError(f"{shown!r}: {name} is {' or '.join(accepted)}", hint=_options_hint())
    if "path_style" in options:
        answer = _YES_OR_NO.get(str(options["path_style"]).lower())
        if answer is None:
            raise ConfigurationError(f"{shown!r}: path_style is 1 or 0", hint=_options_hint())
        options["path_style"] = answer
    return options


def _options_hint() -> str:
    return f"the options are {', '.join(S3_OPTIONS)}, as in s3://bucket/prefix?endpoint=http://127.0.0.1:8333"


def _without_user(url: str) -> str:
    """Return the address without what may be credentials, for messages."""
    return re.sub(r"//[^/?#]*@", "//", url)
