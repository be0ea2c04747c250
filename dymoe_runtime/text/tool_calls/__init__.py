"""Calls of tools: definitions and results in the prompt, and the calls of an answer told apart from its text."""

from dymoe_runtime.text.tool_calls.formats import parser_for
from dymoe_runtime.text.tool_calls.parser import CallDelta, Parsed, ToolCallParser

__all__ = ["CallDelta", "Parsed", "ToolCallParser", "parser_for"]
