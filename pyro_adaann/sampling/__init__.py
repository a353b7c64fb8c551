"""Samplers that anneal: sequential Monte Carlo, chains that polish a fit, and judges of a fit."""
