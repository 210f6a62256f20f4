"""What a Python test text does when it is run: one that only defines functions, or asserts nothing, passes any answer.

Texts are parsed, not run. One that is not Python by itself, such as another language, gets the benefit of the doubt.
"""

import ast
import re
from collections.abc import Iterator

__all__ = ["asserts", "leaves_check_uncalled"]

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_FAILING = re.compile("assert|fail|exit", re.IGNORECASE)
"""Matches the names of functions that can fail a test, such as numpy's `assert_allclose`."""


def asserts(test: str) -> bool:
    """Whether running `test` reaches an assertion, or calls its own function or class where it has an assertion."""
    tree = _parsed(test)
    if tree is None:
        return True
    starts = {"main", *_definitions(tree)}  # `unittest.main` runs classes that nothing else calls
    begun = any(_can_fail(node) or _called_name(node) in starts for node in _run_at_once(tree))
    return begun and any(map(_can_fail, ast.walk(tree)))


def leaves_check_uncalled(test: str) -> bool:
    """Whether `test` defines a function `check` at its top level, and does not call it there."""
    tree = _parsed(test)
    if tree is None:
        lines = test.splitlines()
        return any(line.startswith("def check(") for line in lines) and not any(
            line.startswith("check(") for line in lines
        )
    return "check" in _definitions(tree) and all(_called_name(node) != "check" for node in _run_at_once(tree))


def _parsed(test: str) -> ast.Module | None:
    try:
        return ast.parse(test)
    except (SyntaxError, ValueError):  # ValueError for a null byte
        return None


def _definitions(tree: ast.Module) -> set[str]:
    return {statement.name for statement in tree.body if isinstance(statement, _DEFINITIONS)}


def _run_at_once(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes outside of functions and classes."""
    for statement in tree.body:
        if not isinstance(statement, _DEFINITIONS):
            yield from ast.walk(statement)


def _can_fail(node: ast.AST) -> bool:
    return isinstance(node, ast.Assert | ast.Raise) or bool(_FAILING.search(_called_name(node)))


def _called_name(node: ast.AST) -> str:
    """`f` of a call `f(...)` or `module.f(...)`, empty for any other node."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name
    return ""
