"""Python programs with one fault each, planted in the functions that their tests name.

A fault is a change of the syntax tree, written back as text; `rewritten` does the same without a change, which
shows that failures come from the faults. Faults are small: one that survives points at weak tests. Only an empty body
must always be caught.
"""

import ast
from collections.abc import Callable, Iterator

__all__ = ["EMPTY", "faulty_programs", "rewritten"]

EMPTY = "the body is `return None`"
_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn,
    ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.NotEq: ast.Eq, ast.IsNot: ast.Is, ast.NotIn: ast.In,
}  # fmt: skip

Function = ast.FunctionDef
Plant = Callable[[list[Function]], bool]
"""Changes the functions in place; False where they have no place for the fault."""


def rewritten(source: str) -> str:
    """`source` from its syntax tree: without comments, otherwise the same program."""
    return ast.unparse(ast.parse(source))


def faulty_programs(source: str, tests: str) -> dict[str, str]:
    """{fault: `source` with it}, for each fault that the functions named in `tests` have a place for."""
    programs = {}
    for fault, plant in _FAULTS.items():
        tree = ast.parse(source)
        if plant(_tested_functions(tree, tests)):
            programs[fault] = ast.unparse(ast.fix_missing_locations(tree))
    return programs


def _tested_functions(tree: ast.Module, tests: str) -> list[Function]:
    named = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    return [node for node in tree.body if isinstance(node, Function) and node.name in named]


def _empty(functions: list[Function]) -> bool:
    for function in functions:
        function.body = [ast.Return(ast.Constant(None))]
    return bool(functions)


class _Returns(ast.NodeTransformer):
    """Changes what a function returns, not what the functions within it do."""

    def __init__(self, change: Callable[[ast.expr], ast.expr]) -> None:
        self.change, self.found = change, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.found = True
        return ast.Return(self.change(node.value or ast.Constant(None)))


def _returns(change: Callable[[ast.expr], ast.expr]) -> Plant:
    def plant(functions: list[Function]) -> bool:
        returns = _Returns(change)
        for function in functions:
            function.body = [returns.visit(statement) for statement in function.body]
        return returns.found

    return plant


def _nodes(functions: list[Function]) -> Iterator[ast.AST]:
    return (node for function in functions for statement in function.body for node in ast.walk(statement))


def _flip_comparison(functions: list[Function]) -> bool:
    found = next((node for node in _nodes(functions) if isinstance(node, ast.Compare)), None)
    if found is not None:
        found.ops[0] = _OPPOSITES[type(found.ops[0])]()
    return found is not None


def _add_one(functions: list[Function]) -> bool:
    numbers = (node for node in _nodes(functions) if isinstance(node, ast.Constant) and type(node.value) is int)
    found = next(numbers, None)
    if found is not None:
        assert type(found.value) is int
        found.value += 1
    return found is not None


_FAULTS: dict[str, Plant] = {
    EMPTY: _empty,
    "results are negated": _returns(lambda value: ast.UnaryOp(ast.Not(), value)),
    "results are in a list": _returns(lambda value: ast.List([value], ast.Load())),
    "a comparison is the opposite": _flip_comparison,
    "a whole number is one more": _add_one,
}
