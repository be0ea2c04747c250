"""OpenAI's responses: an answer as items, whole or as named events."""
