"""Machines by a few rates: measuring them, and predicting from them how fast a model runs."""
