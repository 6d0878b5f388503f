"""Leask et al. 2025: BatchTopK, stitching, meta-SAEs, editing."""
