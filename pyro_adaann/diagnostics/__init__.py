"""Is the fit to be trusted? Draws, importance weights, ladder, evidence, verdict.

What lives here looks at a fit and changes nothing of it.
"""
