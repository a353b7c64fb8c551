"""Targets of the field, and what one would use instead, measured alike: `python -m benchmarks.rivals`."""
