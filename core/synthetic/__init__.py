"""Data with a ground truth: planted entities, and sparse codes with a known dictionary."""
