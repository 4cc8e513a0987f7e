"""docs/ordering.md: every rule names the tests that hold it, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "ordering.md").read_text()


def rules() -> dict[int, list[str]]:
    """Return the tests that each numbered rule names."""
    found: dict[int, list[str]] = {}
    for line in TEXT.splitlines():
        if numbered := re.match(r"(\d+)\. ", line):
            found[int(numbered[1])] = []
        elif named := re.match(r" +- `(tests/\S+)`$", line):
            found[max(found)].append(named[1])
    return found


def test_the_rules_are_numbered_without_gaps() -> None:
    assert list(rules()) == list(range(1, len(rules()) + 1))
    assert len(rules()) >= 12


def test_every_test_that_is_mentioned_belongs_to_a_rule() -> None:
    assert TEXT.count("::") == sum(map(len, rules().values()))


@pytest.mark.parametrize("number", rules())
def test_every_rule_names_tests_that_exist(number: int) -> None:
    assert rules()[number], f"rule {number} names no test"
    for name in rules()[number]:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
