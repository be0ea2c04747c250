"""Continuous batching: the requests that run share each expert that is read."""
