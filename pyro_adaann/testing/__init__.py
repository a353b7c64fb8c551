"""The laws of schedules, steps, losses and flows, as test classes to inherit in your own tests.

Needs pytest. Nothing else in the package imports from here.
"""
