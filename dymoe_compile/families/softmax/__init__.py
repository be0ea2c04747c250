"""Families whose routers take the softmax of all logits."""
