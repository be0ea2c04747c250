"""Tier policy: measured sensitivities, candidate rules, and the operating points that a bundle keeps."""
