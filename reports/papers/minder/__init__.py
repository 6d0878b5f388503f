"""Minder et al. 2025."""
