"""What expressions of a PowerShell for tests are: values, from the syntax tree."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import tree_sitter

from tests.support.powershell_values import (
    NotKnownError,
    Table,
    Thrown,
    cast,
    collapsed,
    compared,
    member,
    member_name,
    text_method,
    text_of,
    truth,
)

_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0"}


@dataclass
class Block:
    """A script block."""

    node: tree_sitter.Node
    text: bytes


class Running(Protocol):
    """A script that is being run, as far as its expressions need it."""

    shell: Any
    scopes: list[dict[str, Any]]
    text: bytes

    def words(self, node: tree_sitter.Node) -> str: ...

    def find(self, name: str) -> Any: ...

    def statement(self, node: tree_sitter.Node) -> list[Any]: ...

    def statements(self, node: tree_sitter.Node) -> list[Any]: ...


@dataclass
class Expressions:
    """Expressions of a script, where it is now."""

    run: Running

    def value(self, node: tree_sitter.Node) -> Any:
        kind = node.type.replace("_argument_expression", "_expression")
        if kind in ("pipeline", "foreach_statement", "if_statement", "pipeline_chain"):
            if kind == "pipeline_chain":
                return self.value(node.named_children[0])
            if kind == "pipeline" and self._is_plain(node):
                return self.value(node.named_children[0].named_children[0])
            return collapsed(self.run.statement(node))
        handler = getattr(self, f"_of_{kind}", None)
        if handler is not None:
            return handler(node)
        if kind.endswith(("_expression", "_literal")) and len(node.named_children) == 1 and node.child_count == 1:
            return self.value(node.named_children[0])
        raise NotKnownError(f"unknown expression {node.type}: {self.run.words(node)}")

    def _is_plain(self, node: tree_sitter.Node) -> bool:
        inner = node.named_children[0]
        return inner.type == "pipeline_chain" and inner.child_count == 1 and inner.named_children[0].type != "command"

    def _of_variable(self, node: tree_sitter.Node) -> Any:
        name = self.run.words(node)[1:].lower()
        if name in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[name]
        return self.run.find(name)

    def _of_integer_literal(self, node: tree_sitter.Node) -> int:
        return int(self.run.words(node))

    def _of_string_literal(self, node: tree_sitter.Node) -> str:
        inner, words = node.named_children[0], self.run.words(node)
        if inner.type == "verbatim_string_characters":
            return words[1:-1].replace("''", "'")
        if inner.type == "verbatim_here_string_characters":
            return words[3:-3]
        if inner.type == "expandable_string_literal" and not inner.named_children and "$" not in words:
            return re.sub("`(.)", lambda found: _ESCAPES.get(found[1], found[1]), words[1:-1])
        raise NotKnownError(f"a text with something in it: {words}")

    def _of_parenthesized_expression(self, node: tree_sitter.Node) -> Any:
        return self.value(node.named_children[0])

    def _of_sub_expression(self, node: tree_sitter.Node) -> Any:
        return collapsed(self.run.statements(node.named_children[0]))

    def _of_array_expression(self, node: tree_sitter.Node) -> list[Any]:
        return self.run.statements(node.named_children[0]) if node.named_children else []

    def _of_array_literal_expression(self, node: tree_sitter.Node) -> Any:
        values = [self.value(one) for one in node.named_children]
        return values[0] if node.child_count == 1 else values

    def _of_script_block_expression(self, node: tree_sitter.Node) -> Block:
        return Block(node, self.run.text)

    def _of_hash_literal_expression(self, node: tree_sitter.Node) -> Table:
        made = Table()
        for body in node.named_children:
            for entry in (one for one in body.named_children if one.type == "hash_entry"):
                made[self.run.words(entry.named_children[0])] = self.value(entry.named_children[1])
        return made

    def _of_logical_expression(self, node: tree_sitter.Node) -> Any:
        if node.child_count == 1:
            return self.value(node.children[0])
        left = truth(self.value(node.children[0]))
        if self.run.words(node.children[1]).lower() == "-and":
            return left and truth(self.value(node.children[2]))
        return left or truth(self.value(node.children[2]))

    def _of_comparison_expression(self, node: tree_sitter.Node) -> Any:
        if node.child_count == 1:
            return self.value(node.children[0])
        left, operator = self.value(node.children[0]), self.run.words(node.children[1]).lower()
        if operator == "-is":
            return self._is(left, self.run.words(node.children[2]))
        return compared(left, operator, self.value(node.children[2]))

    def _is(self, value: Any, name: str) -> bool:
        wanted = name.strip("[]").lower()
        return any(one.lower() == wanted for one in getattr(value, "types", ()))

    def _of_additive_expression(self, node: tree_sitter.Node) -> Any:
        if node.child_count == 1:
            return self.value(node.children[0])
        left, right = self.value(node.children[0]), self.value(node.children[2])
        if self.run.words(node.children[1]) == "-":
            return left - right
        return left + text_of(right) if isinstance(left, str) else left + right

    def _of_multiplicative_expression(self, node: tree_sitter.Node) -> Any:
        if node.child_count == 1:
            return self.value(node.children[0])
        return self.value(node.children[0]) * self.value(node.children[2])

    def _of_expression_with_unary_operator(self, node: tree_sitter.Node) -> Any:
        if node.child_count == 1:
            return self.value(node.children[0])
        operator = self.run.words(node.children[0]).lower()
        if operator == "-":
            return -self.value(node.children[1])
        if operator in ("-not", "!"):
            return not truth(self.value(node.children[1]))
        raise NotKnownError(self.run.words(node))

    def _of_cast_expression(self, node: tree_sitter.Node) -> Any:
        return cast(
            self.run.words(node.named_children[0]).strip("[").removesuffix("]"), self.value(node.named_children[1])
        )

    def _of_post_increment_expression(self, node: tree_sitter.Node) -> Any:
        name = self.run.words(node.named_children[0])[1:].lower()
        before = self.run.find(name)
        self.run.scopes[-1][name] = before + 1
        return before

    def _of_element_access(self, node: tree_sitter.Node) -> Any:
        owner, index = self.value(node.named_children[0]), self.value(node.named_children[1])
        if isinstance(owner, list):
            return owner[index] if -len(owner) <= index < len(owner) else None
        return owner.get(owner.key(index)) if isinstance(owner, Table) else owner[index]

    def _of_member_access(self, node: tree_sitter.Node) -> Any:
        owner, name = self._owner(node), self.run.words(node.named_children[-1])
        return member(owner, name)

    def _owner(self, node: tree_sitter.Node) -> Any:
        first = node.named_children[0]
        return self._type(self.run.words(first)) if first.type == "type_literal" else self.value(first)

    def _type(self, words: str) -> Any:
        name = words.strip("[]").lower().removeprefix("system.")
        if name not in self.run.shell.types:
            raise NotKnownError(f"there is no type {words}")
        return self.run.shell.types[name]

    def _of_invokation_expression(self, node: tree_sitter.Node) -> Any:
        owner, name = self._owner(node), self.run.words(node.named_children[1])
        listed = next(one for one in node.named_children if one.type == "argument_list")
        arguments = []
        for one in (each for each in listed.named_children if each.type == "argument_expression_list"):
            arguments = [self.value(each.named_children[0]) for each in one.named_children]
        if owner is None:
            raise Thrown("You cannot call a method on a null-valued expression.", category="InvalidOperation")
        if isinstance(owner, str):
            return text_method(owner, name.lower(), arguments)
        known = member_name(owner, name)
        if known is None or not callable(getattr(owner, known)):
            raise NotKnownError(f"{type(owner).__name__} has no method {name}")
        return getattr(owner, known)(*arguments)
