"""Sources with a ground truth: planted entities, and sparse codes under a known dictionary."""
