"""The protocol of OpenAI: chat completions, completions, responses and models."""
