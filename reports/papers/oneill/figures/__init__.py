"""The figures of O'Neill et al. 2025, one module for each experiment, and what they share (`common`)."""
