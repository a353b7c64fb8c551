"""What changes during a fit: parameters, stages, rungs, recoveries, checkpoints, budget, progress.

Each class here owns one piece of state; `fit.py` combines them.
"""
