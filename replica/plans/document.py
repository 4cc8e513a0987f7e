"""The text of a plan as a tree of nodes that know their places: YAML without types, tags, duplicates or bombs.

What a plain word means is a matter of the field that it stands in, so that ``no`` is a name where a name belongs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

LARGEST_BYTES: Final = 256 << 10
MOST_NODES: Final = 20_000  # with aliases counted as what they stand for
DEEPEST: Final = 16
MOST_MISTAKES: Final = 100


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is written: line and column, from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something that is wrong with a plan, and where."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"line {self.place.line}, column {self.place.column}: {self.text}"


@dataclass(frozen=True, slots=True)
class Scalar:
    """A word or text. ``is_plain``: it was written without quotes, so that it may be meant as a number or a truth."""

    place: Place
    text: str
    is_plain: bool

    @property
    def is_empty(self) -> bool:
        """Whether nothing is written there."""
        return self.is_plain and self.text in ("", "~", "null")


@dataclass(slots=True)
class Sequence:
    """A list."""

    place: Place
    items: list[Node] = field(default_factory=list)
    weight: int = 1


@dataclass(slots=True)
class Mapping:
    """Keys and values, in their order."""

    place: Place
    entries: list[tuple[Scalar, Node]] = field(default_factory=list)
    weight: int = 1


Node = Scalar | Sequence | Mapping


class DocumentError(Exception):
    """The text is no plan at all: what is wrong keeps the rest from being looked at."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


def parse(text: str, mistakes: list[Mistake]) -> Node:
    """Return the tree of a document; what is wrong but can be gone on from is added to ``mistakes``.

    Raises DocumentError where the text is no YAML, or more than a plan may be.
    """
    if len(text) > LARGEST_BYTES or len(text.encode("utf-8", "surrogatepass")) > LARGEST_BYTES:
        raise DocumentError(Mistake(Place(1, 1), f"a plan has at most {LARGEST_BYTES >> 10} KiB"))
    try:
        return _Builder(mistakes).build(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(1, 1) if mark is None else _place(mark)
        raise DocumentError(Mistake(place, f"this is no YAML: {error.problem or error.context}")) from error
    except yaml.YAMLError as error:  # characters that YAML does not have
        raise DocumentError(Mistake(Place(1, 1), f"this is no YAML: {' '.join(str(error).split())[:200]}")) from error
    except (ValueError, RecursionError, IndexError) as error:
        raise DocumentError(Mistake(Place(1, 1), "this is no YAML")) from error


def plain(node: Node) -> object:
    """Return a node as Python has it: plain whole numbers and truths as such, all else as text."""
    if isinstance(node, Mapping):
        return {key.text: plain(value) for key, value in node.entries}
    if isinstance(node, Sequence):
        return [plain(one) for one in node.items]
    if node.is_plain and node.text in ("true", "false"):
        return node.text == "true"
    if node.is_plain and node.text.lstrip("-").isdecimal() and node.text.isascii() and len(node.text) <= 18:
        try:
            return int(node.text)
        except ValueError:  # more than one sign
            return node.text
    return node.text


def _place(mark: Any) -> Place:
    """Return the place of a mark, which every event of a parser has."""
    return Place(mark.line + 1, mark.column + 1)


class _Builder:
    """Makes a tree of events; what is too deep or too much is refused before it is built."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        self._mistakes = mistakes
        self._anchors: dict[str, Node] = {}
        self._open: list[tuple[Sequence | Mapping, str | None]] = []
        self._keys: list[Scalar | None] = []  # of each open mapping, the key whose value comes next
        self._seen: list[set[str]] = []
        self._root: Node | None = None
        self._documents = 0

    def build(self, events: Iterable[yaml.Event]) -> Node:
        for event in events:
            self._take(event)
        if self._root is None:
            raise DocumentError(Mistake(Place(1, 1), "the file is empty"))
        return self._root

    def _take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise DocumentError(Mistake(_place(event.start_mark), "a file holds one plan, and here begins another"))
        elif isinstance(event, yaml.AliasEvent):
            found = self._anchors.get(event.anchor or "")
            if found is None:
                raise DocumentError(Mistake(_place(event.start_mark), f"nothing is named &{event.anchor} before this"))
            self._put(found, _place(event.start_mark))
        elif isinstance(event, yaml.ScalarEvent):
            place = _place(event.start_mark)
            self._refuse_tag(event.tag, place)
            made = Scalar(place, event.value, event.style is None)
            self._put(made, place)
            self._name(event.anchor, made)
        elif isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
            place = _place(event.start_mark)
            self._refuse_tag(event.tag, place)
            if len(self._open) >= DEEPEST:
                raise DocumentError(Mistake(place, f"nothing in a plan is nested deeper than {DEEPEST} levels"))
            is_list = isinstance(event, yaml.SequenceStartEvent)
            self._open.append((Sequence(place) if is_list else Mapping(place), event.anchor))
            self._keys.append(None)
            self._seen.append(set())
        elif isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
            done, anchor = self._open.pop()
            self._keys.pop()
            self._seen.pop()
            self._put(done, done.place)
            self._name(anchor, done)  # only now: within itself it cannot be meant

    def _name(self, anchor: str | None, node: Node) -> None:
        if anchor is not None:
            self._anchors[anchor] = node

    def _refuse_tag(self, tag: str | None, place: Place) -> None:
        if tag is not None and tag != "!":
            self._mistake(place, f"tags have no meaning in a plan: {tag:.60}")

    def _put(self, node: Node, place: Place) -> None:
        if not self._open:
            self._root = node
            return
        parent, _ = self._open[-1]
        weight = 1 if isinstance(node, Scalar) else node.weight
        parent.weight += weight
        if sum(one.weight for one, _ in self._open) > MOST_NODES:
            raise DocumentError(Mistake(place, f"a plan has at most {MOST_NODES} values, aliases counted each time"))
        if isinstance(parent, Sequence):
            parent.items.append(node)
            return
        key = self._keys[-1]
        if key is None:
            if not isinstance(node, Scalar):
                raise DocumentError(Mistake(place, "a key is one word, and no list or table"))
            if node.text in self._seen[-1]:
                self._mistake(place, f"{node.text:.60} is there twice")
            self._seen[-1].add(node.text)
            self._keys[-1] = Scalar(place, node.text, node.is_plain)
            return
        parent.entries.append((key, node))
        self._keys[-1] = None

    def _mistake(self, place: Place, text: str) -> None:
        if len(self._mistakes) < MOST_MISTAKES:
            self._mistakes.append(Mistake(place, text))
