"""Is the fit to be trusted? Draws, weights, ladder, evidence, verdict."""
