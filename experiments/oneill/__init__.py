"""O'Neill et al. 2025: the amortisation gap, on planted codes and on GPT-2."""
