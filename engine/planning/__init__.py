"""Numbers only: does a model fit, at which level, how fast. No torch."""
