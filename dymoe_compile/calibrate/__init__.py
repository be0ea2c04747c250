"""One pass of the calibration text through the original model."""
