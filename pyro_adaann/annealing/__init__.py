"""Which tempered density, which inverse temperature next, when a stage ends, and the record of a fit.

What lives here never changes (paths, schedules, stage rules, a ladder's settings) or is a record (the
history). Nothing here runs a model, but for the handlers that temper one.
"""
