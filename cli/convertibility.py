"""How commands show whether a VM can be started as Generation 1: the verdict in a line, the reasons below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def lines(document: Mapping[str, Any] | None) -> list[str]:
    """Return the verdict of a point as lines of text, from its JSON form; None is a point that has none."""
    if document is None:
        return ["not known: the newest point says nothing of it"]
    verdict, system, because = document["verdict"], document["system"], document["because"]
    said = [f"{verdict}{f', {system}' if system else ''}{f': {because}' if because else ''}"]
    if document["pending"]:
        said[0] += " (a later cycle looks again: what this rests upon has changed, or could not be read)"
    if verdict == "convertible":
        return said
    for one in document["findings"]:
        if one["severity"] != "refusal":
            continue
        said.append(f"{one['message']} [{one['rule']}: {one['subject']}; {one['evidence']}]")
        if one["remedy"]:
            said.append(f"  {one['remedy']}")
    return said
