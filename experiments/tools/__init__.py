"""What is no experiment of a paper: the bundled model's training, and exporting a dictionary."""
