"""Which tempered density, which inverse temperature next, when a stage ends, and what was done."""
