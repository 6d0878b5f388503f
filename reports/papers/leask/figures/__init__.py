"""The figures of Leask et al. 2025, one module for each experiment."""
