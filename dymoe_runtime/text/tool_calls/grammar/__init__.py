"""Grammars of calls: what an answer must be that has to call a tool, in the format of each family."""
