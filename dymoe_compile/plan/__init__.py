"""What a compilation will give and take, from the shape of a model alone; PyTorch is not imported."""
