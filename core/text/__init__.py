"""Sources of text (the bundled corpus, local files, the hub) and the rows of tokens made from it."""
