"""Constrained output: answers that follow a JSON schema or a grammar, by masks on the logits."""

from dymoe_runtime.text.constraints.constraint import Constraint, Grammar
from dymoe_runtime.text.constraints.grammars import Grammars

__all__ = ["Constraint", "Grammar", "Grammars"]
