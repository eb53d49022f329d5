"""Masked operator norms: estimates for training, and bounds of two guarantees."""
