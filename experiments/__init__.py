"""One module for each experiment: `run(cfg)` gives its flat metrics."""
