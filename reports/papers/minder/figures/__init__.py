"""The figures of Minder et al. 2025, one module for each experiment."""
