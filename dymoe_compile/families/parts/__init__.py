"""What family files are made of: configurations, names of tensors, and parts of specifications."""
