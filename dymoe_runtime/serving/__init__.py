"""Serve a loaded bundle to clients of OpenAI's, Anthropic's and Ollama's protocols."""
