"""The laws of schedules, steps, losses and flows, as test classes that tests of one's own inherit.

Needs pytest. Nothing else in the package imports from here.
"""
