"""What changes during a fit: parameters, stages, rungs, recoveries, checkpoints, budget, progress.

Every piece of state has one owner here, and `fit.py` holds them together.
"""
