"""A PowerShell for tests: runs scripts from their syntax tree, as Windows PowerShell 5.1 would, cmdlets given by whom.

It knows what our scripts use and refuses the rest: an unknown cmdlet, parameter, type, member or piece of syntax is an
error, never passed over. Values are Python's: None, bool, int, str, list, bytes, ``Table`` for hashtables, and objects
whose members are found whatever their case.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tree_sitter
import tree_sitter_powershell

from tests.support.powershell_expressions import Block, Expressions
from tests.support.powershell_values import (
    NotKnownError,
    PsObject,
    Table,
    Thrown,
    cast,
    collapsed,
    member_name,
    text_of,
    truth,
    unrolled,
)

PARSER = tree_sitter.Parser(tree_sitter.Language(tree_sitter_powershell.language()))


@functools.lru_cache(maxsize=64)
def parsed(text: str) -> tuple[tree_sitter.Node, bytes]:
    """Return the syntax tree of a script."""
    data = text.encode()
    return PARSER.parse(data).root_node, data


@functools.lru_cache(maxsize=64)
def errors_of(text: str) -> list[str]:
    """Return the places where the text is no PowerShell."""
    root, data = parsed(text)
    wrong, nodes = [], [root]
    while nodes:
        node = nodes.pop()
        if node.type == "ERROR" or node.is_missing:
            wrong.append(f"{node.start_point}: {data[node.start_byte : node.end_byte][:80]!r}")
        nodes += node.children
    return wrong


class _Leave(Exception):  # noqa: N818
    def __init__(self, kind: str, values: list[Any] | None = None) -> None:
        self.kind, self.values = kind, values or []


@dataclass
class Cmdlet:
    """A cmdlet: its parameters, those of them that are switches, and which one the pipeline gives."""

    run: Callable[..., Any]
    parameters: tuple[str, ...] = ()
    switches: tuple[str, ...] = ()
    pipeline: str = ""


@dataclass
class _Function:
    parameters: list[tuple[str, str, tree_sitter.Node | None]]
    body: tree_sitter.Node | None
    text: bytes


@dataclass
class PowerShell:
    """A runspace. ``types`` are classes by their names in lower case, whose members are static."""

    cmdlets: Mapping[str, Cmdlet]
    types: Mapping[str, Any] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)
    steps: int = 0

    def run(self, text: str, parameters: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> list[Any]:
        """Run a script with parameters by name, and return what it puts out. Raises Thrown."""
        wrong = errors_of(text)
        if wrong:
            raise NotKnownError(f"no PowerShell: {wrong}")
        root, data = parsed(text)
        given = {one.lower(): value for one, value in (variables or {}).items()}
        return _Run(self, given).script(root, data, dict(parameters))


def run_block(shell: PowerShell, block: Block, arguments: Sequence[Any]) -> list[Any]:
    """Run a script block elsewhere: it sees nothing of the script that it was written in."""
    inner = next((one for one in block.node.named_children if one.type == "script_block"), None)
    return [] if inner is None else _Run(shell, {}).script(inner, block.text, {}, arguments)


@dataclass
class _Run:
    shell: PowerShell
    given: Mapping[str, Any]
    scopes: list[dict[str, Any]] = field(default_factory=list)
    functions: dict[str, _Function] = field(default_factory=dict)
    text: bytes = b""

    # -- scripts, functions, blocks

    def script(self, root: tree_sitter.Node, text: bytes, named: dict[str, Any], args: Sequence[Any] = ()) -> list[Any]:
        """Run a script or a script block's body in a scope of its own."""
        declared = next((one for one in root.named_children if one.type == "param_block"), None)
        parameters = [] if declared is None else _parameters(declared, text)
        body = next((one for one in root.named_children if one.type in ("statement_list", "script_block_body")), None)
        if body is not None and body.type == "script_block_body":
            body = next((one for one in body.named_children if one.type == "statement_list"), None)
        seen = {"_": self.find("_")} if any("_" in one for one in self.scopes) else {}
        return self.call(_Function(parameters, body, text), named, args, seen)

    def call(self, function: _Function, named: dict[str, Any], args: Sequence[Any], start: dict[str, Any]) -> list[Any]:
        scope = dict(start)
        left = {name.lower(): value for name, value in named.items()}
        free = list(args)
        outer = self.text
        self.text = function.text
        self.scopes.append(scope)
        try:
            for name, type_, default in function.parameters:
                if name in left:
                    value = left.pop(name)
                elif free:
                    value = free.pop(0)
                else:
                    value = None if default is None else self.value(default)
                scope[name] = cast(type_, value) if type_ else value
            if left or free:
                raise Thrown(f"A parameter cannot be found that matches {[*left, *free]}.", category="InvalidArgument")
            return [] if function.body is None else self.statements(function.body)
        except _Leave as leave:
            if leave.kind != "return":
                raise
            return leave.values
        finally:
            self.scopes.pop()
            self.text = outer

    def block(self, block: Block, item: Any) -> list[Any]:
        """Run a script block on one object of a pipeline."""
        inner = next((one for one in block.node.named_children if one.type == "script_block"), None)
        if inner is None:
            return []
        self.scopes.append({"_": item})
        try:
            return self.script(inner, block.text, {})
        finally:
            self.scopes.pop()

    def find(self, name: str) -> Any:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name in self.given:
            return self.given[name]
        raise NotKnownError(f"${name} has no value here")

    # -- statements

    def statements(self, node: tree_sitter.Node) -> list[Any]:
        out: list[Any] = []
        for one in node.named_children:
            try:
                out += self.statement(one)
            except _Leave as leave:
                leave.values = [*out, *leave.values]
                raise
        return out

    def statement(self, node: tree_sitter.Node) -> list[Any]:
        self.shell.steps += 1
        if self.shell.steps > 100_000:
            raise NotKnownError("the script does not end")
        handler = getattr(self, f"_do_{node.type}", None)
        if handler is None:
            raise NotKnownError(f"unknown statement {node.type}: {self.words(node)}")
        out: list[Any] = handler(node)
        return out

    def words(self, node: tree_sitter.Node) -> str:
        return self.text[node.start_byte : node.end_byte].decode()

    def _do_comment(self, node: tree_sitter.Node) -> list[Any]:
        return []

    _do_empty_statement = _do_comment

    def _do_pipeline(self, node: tree_sitter.Node) -> list[Any]:
        if len(node.named_children) != 1:
            raise NotKnownError(self.words(node))
        inner = node.named_children[0]
        if inner.type == "assignment_expression":
            self._assign(inner)
            return []
        stages = [one for one in inner.children if one.type != "|"]
        if len(stages) == 1 and stages[0].type != "command":
            if self._is_increment(stages[0]):
                self.value(stages[0])
                return []
            value = self.value(stages[0])
            return [] if value is None and self._is_call(stages[0]) else unrolled(value)  # methods without a result
        items: list[Any] | None = None
        for stage in stages:
            items = self._command(stage, items) if stage.type == "command" else unrolled(self.value(stage))
        return items or []

    def _is_increment(self, node: tree_sitter.Node) -> bool:
        while len(node.named_children) == 1 and node.type != "post_increment_expression":
            node = node.named_children[0]
        return node.type == "post_increment_expression"

    def _is_call(self, node: tree_sitter.Node) -> bool:
        while len(node.named_children) == 1 and node.type != "invokation_expression":
            node = node.named_children[0]
        return node.type == "invokation_expression"

    def _do_function_statement(self, node: tree_sitter.Node) -> list[Any]:
        name = next(one for one in node.named_children if one.type == "function_name")
        declared = next((one for one in node.named_children if one.type == "function_parameter_declaration"), None)
        block = next((one for one in node.named_children if one.type == "script_block"), None)
        body = None
        if block is not None:
            inside = next((one for one in block.named_children if one.type == "script_block_body"), None)
            body = None if inside is None else inside.named_children[0]
        parameters = [] if declared is None else _parameters(declared, self.text)
        self.functions[self.words(name).lower()] = _Function(parameters, body, self.text)
        return []

    def _do_if_statement(self, node: tree_sitter.Node) -> list[Any]:
        branches: list[tuple[tree_sitter.Node | None, tree_sitter.Node]] = []
        condition = next(one for one in node.named_children if one.type == "pipeline")
        branches.append((condition, next(one for one in node.named_children if one.type == "statement_block")))
        for clauses in (one for one in node.named_children if one.type == "elseif_clauses"):
            branches += [(one.named_children[0], one.named_children[-1]) for one in clauses.named_children]
        branches += [(None, one.named_children[-1]) for one in node.named_children if one.type == "else_clause"]
        for asked, block in branches:
            if asked is None or truth(self.value(asked)):
                return self._statement_block(block)
        return []

    def _statement_block(self, node: tree_sitter.Node) -> list[Any]:
        inner = next((one for one in node.named_children if one.type == "statement_list"), None)
        return [] if inner is None else self.statements(inner)

    def _do_foreach_statement(self, node: tree_sitter.Node) -> list[Any]:
        name = self.words(node.named_children[0])[1:].lower()
        listed = self.value(node.named_children[1])
        out: list[Any] = []
        for one in [] if listed is None else unrolled(listed):
            self.scopes[-1][name] = one
            if not self._once(node.named_children[2], out):
                break
        return out

    def _once(self, block: tree_sitter.Node, out: list[Any]) -> bool:
        try:
            out += self._statement_block(block)
        except _Leave as leave:
            out += leave.values
            if leave.kind == "break":
                return False
            leave.values = out
            raise
        return True

    def _do_while_statement(self, node: tree_sitter.Node) -> list[Any]:
        out: list[Any] = []
        while truth(self.value(node.named_children[0].named_children[0])):
            self.shell.steps += 1
            if self.shell.steps > 100_000:
                raise NotKnownError("a loop does not end")
            if not self._once(node.named_children[1], out):
                break
        return out

    def _do_for_statement(self, node: tree_sitter.Node) -> list[Any]:
        parts = {one.type: one for one in node.named_children}
        out: list[Any] = []
        self._assign(parts["for_initializer"].named_children[0].named_children[0]
                     if parts["for_initializer"].named_children[0].type == "pipeline"
                     else parts["for_initializer"].named_children[0])  # fmt: skip
        while truth(self.value(parts["for_condition"].named_children[0])):
            if not self._once(parts["statement_block"], out):
                break
            self.value(parts["for_iterator"].named_children[0])
        return out

    def _do_flow_control_statement(self, node: tree_sitter.Node) -> list[Any]:
        kind = self.words(node.children[0]).lower()
        operand = node.named_children[0] if node.named_children else None
        if kind == "throw":
            if operand is None:
                raise self.find("__thrown")
            value = self.value(operand)
            raise value if isinstance(value, Thrown) else Thrown(text_of(value), category="OperationStopped")
        raise _Leave(kind, [] if operand is None else self._outputs(operand))

    def _outputs(self, node: tree_sitter.Node) -> list[Any]:
        return self._do_pipeline(node) if node.type == "pipeline" else unrolled(self.value(node))

    def _do_try_statement(self, node: tree_sitter.Node) -> list[Any]:
        parts = {one.type: one for one in node.named_children}
        try:
            return self._statement_block(parts["statement_block"])
        except Thrown as error:
            if "catch_clauses" not in parts:
                raise
            clause = parts["catch_clauses"].named_children[0]
            record = PsObject(Exception=error, CategoryInfo=PsObject(Category=error.category))
            self.scopes.append({"_": record, "__thrown": error})
            try:
                return self._statement_block(clause.named_children[-1])
            finally:
                scope = self.scopes.pop()
                # What is assigned in a block is assigned where the block is.
                self.scopes[-1].update({k: v for k, v in scope.items() if k not in ("_", "__thrown")})
        finally:
            if "finally_clause" in parts:
                self._statement_block(parts["finally_clause"].named_children[-1])

    # -- assignment

    def _assign(self, node: tree_sitter.Node) -> None:
        target, operator, source = node.named_children[0], self.words(node.named_children[1]), node.named_children[2]
        while target.type not in ("variable", "member_access", "element_access"):
            target = target.named_children[0]
        value = self.value(source)
        if target.type == "variable":
            name = self.words(target)[1:].lower()
            if operator == "+=":
                value = self.find(name) + value
            if name != "null":
                self.scopes[-1][name] = value
            return
        owner = self.value(target.named_children[0])
        if target.type == "element_access":
            owner[self.value(target.named_children[1])] = value
            return
        name = self.words(target.named_children[-1])
        if isinstance(owner, Table):
            owner[name] = value
            return
        known = member_name(owner, name)
        if known is None:
            raise Thrown(f"The property '{name}' cannot be found on this object.", category="InvalidOperation")
        setattr(owner, known, value)

    # -- commands

    def _command(self, node: tree_sitter.Node, items: list[Any] | None) -> list[Any]:
        name = self.words(node.named_children[0])
        elements = node.named_children[1] if len(node.named_children) > 1 else None
        words = [] if elements is None else list(self._elements(elements))
        low = name.lower()
        if low in ("where-object", "foreach-object"):
            block = words[0][1]
            assert isinstance(block, Block)
            out = []
            for item in items or []:
                made = self.block(block, item)
                out += [item] if low == "where-object" and truth(collapsed(made)) else made if low[0] == "f" else []
            return out
        if low in self.functions:
            named = {word: value for word, value in words if word is not None}
            return self.call(self.functions[low], named, [value for word, value in words if word is None], {})
        cmdlet = next((one for known, one in self.shell.cmdlets.items() if known.lower() == low), None)
        if cmdlet is None:
            raise NotKnownError(f"there is no cmdlet {name}")
        self.shell.called.append(name)
        return self._cmdlet(name, cmdlet, words, items)

    def _elements(self, node: tree_sitter.Node) -> Iterator[tuple[str | None, Any]]:
        """Yield what stands behind a command: names of parameters with what follows each, and values alone."""
        waiting: str | None = None
        for one in node.named_children:
            if one.type == "command_argument_sep":
                continue
            if one.type == "command_parameter":
                if waiting is not None:
                    yield waiting, True
                waiting = self.words(one)[1:]
                continue
            words = self.words(one)
            if re.fullmatch(r"@\w+", words):
                if waiting is not None:
                    yield waiting, True
                    waiting = None
                yield from self.find(words[1:].lower()).items()
                continue
            value = words if one.type in ("generic_token", "command_token") else self.value(one)
            yield waiting, value
            waiting = None
        if waiting is not None:
            yield waiting, True

    def _cmdlet(
        self, name: str, cmdlet: Cmdlet, words: list[tuple[str | None, Any]], items: list[Any] | None
    ) -> list[Any]:
        known = {one.lower(): one for one in (*cmdlet.parameters, *cmdlet.switches)}
        named: dict[str, Any] = {}
        for word, value in words:
            if word is None:  # by place
                word = next(one for one in cmdlet.parameters if one not in named)
            if word.lower() not in known:
                raise Thrown(
                    f"A parameter cannot be found that matches parameter name '{word}' of {name}.",
                    category="InvalidArgument",
                    types=("System.Management.Automation.ParameterBindingException",),
                )
            is_switch = known[word.lower()] in cmdlet.switches
            if is_switch != (value is True or value is False) and is_switch:
                raise Thrown(f"{name}: {word} takes nothing", category="InvalidArgument")
            named[known[word.lower()]] = value
        calls = [named] if items is None or not cmdlet.pipeline else [{**named, cmdlet.pipeline: one} for one in items]
        out: list[Any] = []
        for call in calls:
            result = cmdlet.run(self, **{_python(key): value for key, value in call.items()})
            out += [] if result is None else result if isinstance(result, list) else [result]
        return out

    def value(self, node: tree_sitter.Node) -> Any:
        """Return what an expression is."""
        return Expressions(self).value(node)


def _python(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _parameters(node: tree_sitter.Node, text: bytes) -> list[tuple[str, str, tree_sitter.Node | None]]:
    """Return name, type and default of each parameter."""
    found = []
    listed = next((one for one in node.named_children if one.type == "parameter_list"), None)
    for one in [] if listed is None else listed.named_children:
        variable = next(each for each in one.named_children if each.type == "variable")
        default = next((each for each in one.named_children if each.type == "script_parameter_default"), None)
        words = text[one.start_byte : variable.start_byte].decode()
        types = re.findall(r"\[(\w+(?:\[\])?)\]", words)
        name = text[variable.start_byte + 1 : variable.end_byte].decode().lower()
        found.append((name, types[-1] if types else "", None if default is None else default.named_children[0]))
    return found
