"""What the platforms can be used for, known without asking them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from replica.errors import UsageError

Generation: TypeAlias = Literal[1, 2]


@dataclass(frozen=True, slots=True)
class Offer:
    """A platform: which ``generations`` its machines may be, and whether it starts them.

    ``is_local``: its machines are of the host that made them, and no other host sees them. ``returns``: they can be
    replicated from, and so come home.
    """

    generations: tuple[Generation, ...] = (1, 2)
    starts: bool = True
    is_local: bool = True
    returns: bool = True

    def generation(self, own: Generation, wanted: Generation | None) -> Generation:
        """Return what a machine starts as: what is ``wanted``, else its ``own`` if that can be. Raises UsageError."""
        if wanted is not None:
            if wanted not in self.generations:
                known = " and ".join(map(str, self.generations))
                raise UsageError(f"this platform has machines of Generation {known} only")
            return wanted
        return own if own in self.generations else self.generations[0]


OFFERS: Final[Mapping[str, Offer]] = {
    "qemu": Offer(),
    "libvirt": Offer(),
    "files": Offer(starts=False),
    "hyperv": Offer(is_local=False),
    "azure": Offer(starts=False, is_local=False, returns=False),
}


def configured(tables: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Offer]:
    """Return the offers as the [platforms] tables have them: Azure starts machines where a resource group is named."""
    starts = bool(tables.get("azure", {}).get("resource_group"))
    return {**OFFERS, "azure": replace(OFFERS["azure"], starts=starts)}


def offer(platform: str, offers: Mapping[str, Offer] = OFFERS) -> Offer:
    """Return what is known of a platform. Raises UsageError."""
    try:
        return offers[platform]
    except KeyError:
        raise UsageError(f"there is no platform {platform!r}", hint=f"there are {', '.join(offers)}") from None
