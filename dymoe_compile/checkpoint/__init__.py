"""Hugging Face checkpoints: their tensors, their weights, and the original model."""
