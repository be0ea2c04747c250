"""Makes a parsed template count what it does: steps in bodies that run again, and sizes of what it makes.

Jinja's sandbox asks its environment before calls, attributes and arithmetic. Everything else that can take time or
memory becomes a call of one of COUNTED here: loops, macros, output, `~`, comparisons, slices and literals.
"""

from __future__ import annotations

from typing import Any

import jinja2.nodes as nodes
from jinja2.visitor import NodeTransformer

from dymoe_runtime.text.chat_template.meter import PER_STEP

# Names of filters that no template can write.
STEP, EMIT, CONCAT, COMPARE, SLICE, LITERAL, MEASURE = COUNTED = (
    "count steps",
    "count output",
    "count ~",
    "count comparison",
    "count slice",
    "count literal",
    "count value",
)
# Steps of what is more than a node: a loop and a macro are objects.
WEIGHTS: dict[type[nodes.Node], int] = {nodes.For: 16, nodes.Macro: 32, nodes.CallBlock: 32}


def counted(template: nodes.Template) -> nodes.Template:
    """Return `template`, changed so that it counts."""
    return _Counting().visit(template)  # type: ignore[no-any-return]


def call(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    """Return the call of one of COUNTED."""
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _Counting(NodeTransformer):
    """Wraps nodes, those inside first."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        units = _count(node.body, node.test)
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_steps(units, node.lineno), node.test, lineno=node.lineno)
        node.body.insert(0, _step_statement(units, node.lineno))
        return node

    def _visit_body(self, node: Any) -> Any:
        units = _count(node.body)
        self.generic_visit(node)
        node.body.insert(0, _step_statement(units, node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [call(EMIT, child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return call(CONCAT, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        return call(SLICE, node.node, node.arg.start or none, node.arg.stop or none, node.arg.step or none)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        first = node.ops[0]
        cheap = len(node.ops) == 1 and _is_cheap(node.expr, first)
        flat = first.expr if cheap and isinstance(first.expr, (nodes.List, nodes.Tuple)) else None
        self.generic_visit(node)
        if flat is not None:
            first.expr = flat
        if cheap:
            return node
        if len(node.ops) == 1:
            return call(COMPARE, node.expr, nodes.Const(first.op, lineno=node.lineno), first.expr)
        node.expr = call(MEASURE, node.expr)
        for operand in node.ops:
            operand.expr = call(MEASURE, operand.expr)
        return node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = call(MEASURE, pair.key)
        return call(LITERAL, node)

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return call(LITERAL, node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return call(LITERAL, node) if node.ctx == "load" else node

    def visit_Call(self, node: nodes.Call) -> nodes.Call:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = call(LITERAL, node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = call(LITERAL, node.dyn_kwargs)
        return node


def _count(*parts: Any) -> int:
    """Return the number of nodes in bodies, which stands for the time that they take."""
    return sum(_count_of(part) for part in parts)


def _count_of(part: list[nodes.Node] | nodes.Node | None) -> int:
    waiting = list(part) if isinstance(part, list) else [part] if part is not None else []
    units = 0
    while waiting:
        node = waiting.pop()
        units += WEIGHTS.get(type(node), 1) + _text_in(node) // PER_STEP
        waiting.extend(node.iter_child_nodes())
    return units + 1


def _text_in(node: nodes.Node) -> int:
    text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
    return len(text) if isinstance(text, str) else 0


def _steps(units: int, lineno: int) -> nodes.Filter:
    return call(STEP, nodes.Const(units, lineno=lineno))


def _step_statement(units: int, lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_steps(units, lineno), lineno=lineno)


def _is_cheap(left: nodes.Expr, operand: nodes.Operand) -> bool:
    """Return whether one side is a constant, so that comparing reads no more than that.

    For `in` that is the list on the right, whose entries are constants.
    """
    right = operand.expr
    if operand.op in ("in", "notin"):
        return isinstance(right, (nodes.List, nodes.Tuple)) and all(isinstance(e, nodes.Const) for e in right.items)
    return isinstance(left, nodes.Const) or isinstance(right, nodes.Const)
