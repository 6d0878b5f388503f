"""O'Neill et al. 2025."""
