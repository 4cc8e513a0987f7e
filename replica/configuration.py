"""The configuration: godwit.toml, environment and flags, in ascending order of say; every mistake named at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from replica.catalog import DEFAULT_TENANT
from replica.errors import ConfigurationError, UsageError
from replica.failover.offer import OFFERS
from replica.keys import check_tenant
from replica.workers import Workers, default_workers

if TYPE_CHECKING:
    from replica.daemon.terms import AgentTerms
    from replica.drills.checks import Terms as DrillTerms

FILE_NAME: Final = "godwit.toml"
SETTINGS: Final = (
    "store",
    "tenant",
    "threads",
    "uploads",
    "state_folder",
    "key_file",
    "key_command",
    "require_encryption",
    "convertibility",
    "agent",
    "drill",
    "platforms",
)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What is in force. ``store`` None means that none was given; ``file`` is the configuration file, if any."""

    store: str | None
    tenant: str
    workers: Workers
    state_folder: Path | None
    file: Path | None
    key_file: Path | None = None
    key_command: str | tuple[str, ...] | None = None
    require_encryption: bool = False
    convertibility: bool = True  # cycles inspect boot disks for whether they convert
    agent: AgentTerms | None = None  # None where the file says nothing of it
    drill: DrillTerms | None = None  # the same
    platforms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # a table each, read by the platform


def load(
    *,
    environment: Mapping[str, str],
    file: Path | None = None,
    store: str | None = None,
    tenant: str | None = None,
    folder: Path | None = None,
) -> Configuration:
    """Return the configuration. ``file``, ``store`` and ``tenant`` are what flags say.

    The file is ``file``, or GODWIT_CONFIG, or the first godwit.toml of: the working ``folder``, the user's
    configuration folder, /etc/godwit. Raises ConfigurationError naming every mistake.
    """
    path = _find(file, environment, folder or Path())
    mistakes: list[str] = []
    values = _read(path) if path else {}
    known = _Known(values, mistakes)
    threads = default_workers().threads
    found = Configuration(
        store=store or environment.get("GODWIT_STORE") or known.take("store", _text, None),
        tenant=tenant or environment.get("GODWIT_TENANT") or known.take("tenant", _tenant, DEFAULT_TENANT),
        workers=Workers(
            threads=known.take("threads", _count, threads), uploads=known.take("uploads", _count, Workers().uploads)
        ),
        state_folder=known.take("state_folder", _path, None),
        file=path,
        key_file=known.take("key_file", _path, None),
        key_command=known.take("key_command", _command, None),
        require_encryption=known.take("require_encryption", _truth, False),
        convertibility=known.take("convertibility", _truth, True),
        agent=_agent(values["agent"], mistakes) if "agent" in values else None,
        drill=_drill(values["drill"], mistakes) if "drill" in values else None,
        platforms=known.take("platforms", _platforms, {}),
    )
    mistakes += [
        f"{name!r} is not a setting: there are {', '.join(SETTINGS)}" for name in values if name not in SETTINGS
    ]
    if mistakes:
        raise ConfigurationError("; ".join(sorted(mistakes)), path=str(path), hint="correct the file and try again")
    return found


def _agent(value: Any, mistakes: list[str]) -> AgentTerms:
    from replica.daemon import terms  # noqa: PLC0415 - only the agent needs it, and time zones take time to import

    found, wrong = terms.read(value)
    mistakes += wrong
    return found


def _drill(value: Any, mistakes: list[str]) -> DrillTerms:
    from replica.drills import checks  # noqa: PLC0415 - only drills need it

    found, wrong = checks.read(value)
    mistakes += wrong
    return found


class _Known:
    """Takes settings out of the file's values, noting what is wrong with them."""

    def __init__(self, values: Mapping[str, Any], mistakes: list[str]) -> None:
        self._values = values
        self._mistakes = mistakes

    def take(self, name: str, check: Callable[[Any], Any], default: Any) -> Any:
        """Return the setting as ``check`` reads it, or the default."""
        if name not in self._values:
            return default
        try:
            return check(self._values[name])
        except (ValueError, UsageError) as error:
            self._mistakes.append(f"{name}: {error}")
            return default


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("should be text")
    return value


def _tenant(value: Any) -> str:
    return check_tenant(_text(value))


def _path(value: Any) -> Path:
    if "\0" in _text(value):
        raise ValueError("cannot be a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~ of a user that does not exist
        raise ValueError(f"{value!r} names nobody's home folder") from error


def _command(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError("should be a command: text, or a list of its words")
    return value


def _platforms(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise ValueError("should be a table for each platform, as in [platforms.NAME]")
    for name in value:
        if name not in OFFERS:
            raise ValueError(f"there is no platform {name!r}: there are {', '.join(OFFERS)}")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("should be true or false")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
        raise ValueError("should be a whole number from 1 to 64")
    return value


def _find(file: Path | None, environment: Mapping[str, str], folder: Path) -> Path | None:
    named = file or (Path(environment["GODWIT_CONFIG"]) if environment.get("GODWIT_CONFIG") else None)
    if named is not None:
        if not named.is_file():
            raise ConfigurationError("there is no such configuration file", path=str(named))
        return named
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME", "/"), ".config")  # noqa: PTH118
    for candidate in (folder / FILE_NAME, Path(home) / "godwit" / FILE_NAME, Path("/etc/godwit") / FILE_NAME):
        if candidate.is_file():
            return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the file: {error.strerror}", path=str(path)) from error
    except RecursionError as error:
        raise ConfigurationError(
            "the file is not valid TOML: its values are nested too deeply", path=str(path)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the file is not valid TOML: {error}", path=str(path)) from error
