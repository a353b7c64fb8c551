"""Which tempered density, which inverse temperature next, when a stage ends, and the record of a fit.

Objects here are immutable settings (paths, schedules, stage rules, ladders) or records (the history). Nothing
here runs a model except the handlers that temper one.
"""
