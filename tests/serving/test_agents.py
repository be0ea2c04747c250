"""What Claude Code 2.1.197 and Codex 0.171.0 send: more than a model can use is no reason to refuse it."""

from __future__ import annotations

from typing import Any

from serving.kit import Scripted, app_of, ask
from serving.test_tools import ASKED, FUNCTION, PARAMETERS, TEMPLATE, scripted
from text_kit import CONFIG, byte_level_backend

from dymoe_runtime.text.tokenizer import Tokenizer

STRICT = "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"


def prompt_of(service: Scripted, path: str, body: Any) -> str:
    answer = ask(app_of(service), "POST", path, json=body)
    assert answer.status_code == 200, answer.text
    return service.requests[0].prompt or ""


def test_tools_that_a_provider_runs_are_left_out() -> None:
    others = [
        {"type": "namespace", "name": "agents", "tools": []},
        {"type": "web_search", "external_web_access": False},
    ]
    body: Any = {"input": "Hi", "tools": [{"type": "function", **FUNCTION}, *others], "include": ["x"], "store": False}
    prompt = prompt_of(scripted(), "/v1/responses", body)
    assert '"weather"' in prompt and "agents" not in prompt and "web_search" not in prompt
    tools = [{"type": "web_search_20250305", "name": "web_search"}, {"name": "weather", "input_schema": PARAMETERS}]
    prompt = prompt_of(scripted(), "/v1/messages", {"messages": ASKED, "max_tokens": 9, "tools": tools})
    assert '"weather"' in prompt and "web_search" not in prompt


def test_system_messages_may_stand_anywhere() -> None:
    """Those at the begin become one; a later one is the user's where the template takes none there."""
    said: Any = [{"role": "developer", "content": "One."}, {"role": "system", "content": "Two."}, *ASKED]
    said += [{"role": "system", "content": [{"type": "text", "text": "Three."}]}]
    assert prompt_of(scripted(), "/v1/chat/completions", {"messages": said}).startswith(
        "[system]One.\n\nTwo.[user]How is Bern?[system]Three."
    )
    service = scripted()
    strict = STRICT + TEMPLATE.partition("{% for m in messages %}")[2]
    service.tokenizer = Tokenizer(byte_level_backend(), CONFIG, {"default": strict})
    body = {"messages": said[2:], "max_tokens": 9, "system": "Zero."}
    assert prompt_of(service, "/v1/messages", body).startswith("[system]Zero.[user]How is Bern?[user]Three.")
