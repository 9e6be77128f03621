# SPDX-License-Identifier: Apache-2.0
"""Solutions of HumanEval that are wrong in one place, as a model's often are: what they return is changed.

Only what stands in a `return` is touched, so a mutation ends when the solution does: loops stay as they are, and the
interpreter stops a recursion that loses its end. Some are as right as before; the tests say which.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from lord_quant.evaluation.humaneval import Problem


COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add}


def mutations(problem: Problem) -> list[str]:
    """Returns completions that differ from the published one in what one `return` gives; at least one."""
    whole = problem.prompt + problem.canonical_solution
    lines = whole.encode().splitlines(keepends=True)
    begins = [sum(map(len, lines[:number])) for number in range(len(lines))]
    first, found = len(problem.prompt.encode()), list[str]()
    for node in ast.walk(ast.parse(whole)):
        if not isinstance(node, ast.Return) or node.value is None:
            continue
        value = node.value
        assert value.end_lineno is not None and value.end_col_offset is not None
        start = begins[node.lineno - 1] + node.col_offset + len("return")
        stop = begins[value.end_lineno - 1] + value.end_col_offset
        rest = whole.encode()[stop:].partition(b"\n")  # brackets that are no part of the value
        if start >= first:
            head, tail = whole.encode()[first:start], b"\n" + rest[2]
            found += [(head + b" " + ast.unparse(other).encode() + tail).decode() for other in _changed(value)]
    return found


def _changed(value: ast.expr) -> Iterator[ast.expr]:
    """Yields expressions that differ from one in one place, the last in all of it."""
    for place, node in enumerate(ast.walk(value)):
        other = copy.deepcopy(value)
        twin = list(ast.walk(other))[place]
        match node, twin:
            case ast.Constant(value=bool()), ast.Constant():
                twin.value = not node.value
            case ast.Constant(value=int() | float() as number), ast.Constant():
                twin.value = number + 1
            case ast.Compare(), ast.Compare() if type(node.ops[0]) in COMPARISONS:
                twin.ops[0] = COMPARISONS[type(node.ops[0])]()
            case ast.BinOp(), ast.BinOp() if type(node.op) in OPERATORS:
                twin.op = OPERATORS[type(node.op)]()
            case ast.BoolOp(), ast.BoolOp():
                twin.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            case _:
                continue
        yield other
    yield ast.Tuple([copy.deepcopy(value)], ast.Load())
