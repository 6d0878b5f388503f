"""Join the results with what the papers claim. This package only reads files; it trains and evaluates nothing."""
