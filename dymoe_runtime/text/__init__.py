"""Text in and out of a model: tokenizer, chat templates, sampling and generation."""
