"""Chat templates: programs of a model's author, rendered as in transformers, within limits of time and memory."""

from dymoe_runtime.text.chat_template.rendering import reason, render, variables_of

__all__ = ["reason", "render", "variables_of"]
