"""Diagnostics of a fit: draws, importance weights, ladder, evidence, verdict.

Functions here read a fit and do not change it.
"""
