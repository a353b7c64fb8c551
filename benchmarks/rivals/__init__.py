"""The field's targets, and the systems one would use instead, measured alike: `python -m benchmarks.rivals`."""
