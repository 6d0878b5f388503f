"""Tools that belong to no paper: training the bundled model, and exporting a dictionary."""
