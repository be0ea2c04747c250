"""Grammars compiled for a tokenizer, by the library llguidance."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dymoe_runtime.errors import DymoeError, needing_extra
from dymoe_runtime.text.constraints.checks import check_grammar_ends, check_text, checked_schema
from dymoe_runtime.text.constraints.constraint import Constraint, Grammar
from dymoe_runtime.text.constraints.vocabulary import Vocabulary
from dymoe_runtime.text.tokenizer import Tokenizer
from dymoe_runtime.text.tool_calls.grammar.choose import WITH_REASONING, call_grammar
from dymoe_runtime.text.tool_calls.parser import Format

EXTRA, PURPOSE = "grammar", "constrained output"
# White space between the parts of JSON, as llama.cpp allows it: with any, a model could go on for ever.
WHITE_SPACE = r"(\x20|\x0A[\x20\x09]{0,20})"
# What compiling and a step may take: about 0.1 s and 25 MB to prepare, 15 ms and 5 ms of a step, 50 MB of states.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# Most characters of what is told of an error.
MAX_REASON = 200


class MatcherGrammar:
    """A grammar that the library has compiled."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, whole: bool = False) -> None:
        """Wrap a matcher of the library that has seen no token."""
        self._matcher, self._vocabulary, self._whole = matcher, vocabulary, whole

    def constraint(self) -> Constraint:
        """Return a constraint for one answer."""
        return MatcherConstraint(self._matcher.deep_copy(), self._vocabulary, self._whole)


class MatcherConstraint:
    """A constraint by a matcher of the library."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary, whole: bool = False) -> None:
        self._matcher, self._vocabulary, self._size = matcher, vocabulary, len(vocabulary.tokens)
        self.whole = whole

    @property
    def ended(self) -> bool:
        """Return whether the text is complete."""
        return bool(self._matcher.is_stopped())

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """Return logits that are -inf for forbidden ids."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        count = min(self._size, len(logits))
        allowed = np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)
        if count == len(logits) and allowed.all():
            return logits
        scores = np.full_like(logits, -math.inf)
        np.copyto(scores[:count], logits[:count], where=allowed)
        return scores

    def permits(self, token_id: int) -> bool:
        """Return whether a token may come next."""
        return token_id < self._size and self._matcher.validate_tokens([token_id]) == 1

    def accept(self, token_id: int) -> None:
        """Take the next token."""
        if self._matcher.is_stopped():  # an end token, or what follows it
            return
        if token_id >= self._size or not self._matcher.consume_token(token_id):
            self._check()
            raise DymoeError(f"token {token_id} does not follow the grammar; take only tokens that it allows")

    def restart(self) -> None:
        """Forget the tokens so far."""
        self._matcher.reset()

    def ways(self, mark: str) -> list[list[int]]:
        """Return for each byte of `mark` the ids that go on with it from there."""
        return self._vocabulary.ways(mark)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise DymoeError(f"the grammar cannot go on: {_reason(self._matcher.get_error())}; simplify it")


class Grammars:
    """A compiler of grammars for the tokens of one tokenizer.

    Making it takes a second or two and some memory for a large vocabulary; make one for each tokenizer, and keep it.

    >>> from dymoe_runtime import Tokenizer
    >>> grammars = Grammars(Tokenizer.load("build/demo.dymoe"))
    >>> grammars.json_schema({"type": "string", "maxLength": 9}).constraint().ended
    False
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the tokens; raise DymoeError if the library is not there, or the tokenizer does not fit."""
        with needing_extra(EXTRA, PURPOSE):
            import llguidance
            from llguidance._tokenizer import TokenizerWrapper
        self._library, self._special = llguidance, tokenizer.special_ids
        self._vocabulary = vocabulary = Vocabulary(tokenizer)
        self._tokens = llguidance.LLTokenizer(TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_ids)

    def json_object(self) -> Grammar:
        """Return the grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool | str, where: str = "the JSON schema") -> Grammar:
        """Return the grammar of JSON that fits a schema, an object or its text.

        Raises DymoeError, which begins with `where`, if the schema is malformed, not supported, too large, or fits no
        value that ends.
        """
        text = checked_schema(schema, where)
        overrides: Any = {"whitespace_pattern": WHITE_SPACE}
        return self._compile(self._library.LLMatcher.grammar_from_json_schema(text, overrides=overrides), where)

    def grammar(self, text: str, where: str = "the grammar") -> Grammar:
        """Return the grammar that a text describes: GBNF, as llama.cpp reads it, or Lark.

        Raises DymoeError, which begins with `where`, if the text is malformed or too large, or its texts never end.
        """
        check_text(text, where)
        if re.search(r"^\s*[\w-]+\s*::=", text, re.MULTILINE):
            from llguidance.gbnf_to_lark import gbnf_to_lark

            try:
                text = gbnf_to_lark(text)
            except (Exception, RecursionError) as error:
                raise DymoeError(f"{where}: not a grammar in GBNF ({_reason(str(error))}); correct it") from error
        check_grammar_ends(text, where)
        return self._compile(self._library.LLMatcher.grammar_from_lark(text), where)

    def regex(self, pattern: str, where: str = "the regular expression") -> Grammar:
        """Return the grammar of texts that match a regular expression; raise DymoeError as `grammar` does."""
        check_text(pattern, where)
        return self._compile(self._library.LLMatcher.grammar_from_regex(pattern), where)

    def calls(
        self, form: Format, definitions: Sequence[Mapping[str, Any]], many: bool = True, where: str = "the tools"
    ) -> Grammar:
        """Return the grammar of answers that call one or more of these tools, or exactly one, in a format.

        `definitions` are in OpenAI's form. Raises DymoeError, which begins with `where`, if the parameters of a tool
        are malformed or too large, or the format cannot be held to them.
        """
        for definition in definitions:
            function = definition.get("function", definition)
            checked_schema(function.get("parameters") or {}, f"{where}: the parameters of '{function.get('name')}'")
        try:
            text = call_grammar(form, definitions, self._special, many)
        except DymoeError as error:
            raise DymoeError(f"{where}: {error}") from error
        return self._compile(self._library.LLMatcher.grammar_from_lark(text), where, form in WITH_REASONING)

    def _compile(self, grammar: str, where: str, whole: bool = False) -> Grammar:
        limits = self._library.LLParserLimits(**LIMITS)
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise DymoeError(f"{where}: {_explained(matcher.get_error())}")
        trial = matcher.deep_copy()
        if not any(trial.compute_bitmask()) or trial.is_error():
            raise DymoeError(f"{where}: no text fits it; correct it")
        return MatcherGrammar(matcher, self._vocabulary, whole)


def _explained(error: str) -> str:
    """Return what an error of the library means, and what to do."""
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    if unknown:
        return f"{unknown[1].replace(chr(34), chr(39))} is not supported; leave it out"
    if error.startswith("oneOf"):
        return "'oneOf' is not supported where two of its schemas may fit one value; use 'anyOf'"
    return f"{_reason(error)}; correct it"


def _reason(error: str) -> str:
    """Return the first line of an error of the library, not too long."""
    line = (error.strip().splitlines() or ["no reason is given"])[0]
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]} ..."
