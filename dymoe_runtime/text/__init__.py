"""Text in and out of a model: tokenizer, chat templates, sampling, generation and conversations."""

# What becomes of a conversation that fills the context: its oldest turns leave, or it ends. The first is the default.
CONTEXT_POLICIES = ("drop", "stop")
