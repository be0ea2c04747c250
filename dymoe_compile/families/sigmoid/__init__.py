"""Families whose routers take the sigmoid of each logit."""
