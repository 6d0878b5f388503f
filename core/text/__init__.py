"""Where text comes from: the bundled corpus, files, the hub; and rows of tokens made of it."""
