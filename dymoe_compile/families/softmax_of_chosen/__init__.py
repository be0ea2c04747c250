"""Families whose routers take the softmax of the logits that they have chosen."""
