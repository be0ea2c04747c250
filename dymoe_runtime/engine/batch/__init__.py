"""A model whose sequences run together: each expert is read and run once for all tokens that chose it."""
