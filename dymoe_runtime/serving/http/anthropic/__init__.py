"""The protocol of Anthropic: messages, and counting their tokens."""
