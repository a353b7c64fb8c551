"""What changes during a fit: parameters, recoveries, checkpoints, counts, progress."""
