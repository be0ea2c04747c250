"""HTTP in front of a service: the protocols of OpenAI, Anthropic and Ollama."""
