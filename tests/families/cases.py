"""The cases of all families."""

from __future__ import annotations

import importlib
from itertools import chain

from families.harness import Case

GROUPS = ("softmax", "sigmoid", "recurrent")
CASES: list[Case] = list(chain.from_iterable(importlib.import_module(f"families.cases_{g}").CASES for g in GROUPS))
