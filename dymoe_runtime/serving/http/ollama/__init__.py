"""The protocol of Ollama: chat, generate, and what it says of models."""
