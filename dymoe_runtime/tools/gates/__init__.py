"""Gates of a pipeline: what a bundle must be for it to be shipped."""
