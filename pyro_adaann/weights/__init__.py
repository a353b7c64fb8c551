"""Draws and their weights, in torch alone: averages, tails, outliers."""

from pyro_adaann.weights.averages import (
    effective_sample_size,
    finite_or_no_weight,
    log_mean_error,
    log_mean_weight,
    resample,
    truncated_weights,
    weighted_mean,
    weighted_mean_and_sd,
)
from pyro_adaann.weights.grouped import grouped_mean, student_factor
from pyro_adaann.weights.outliers import median_and_reach, standard_deviation, winsorize
from pyro_adaann.weights.pareto import pareto_smooth, reliable_shape

__all__ = [
    "effective_sample_size",
    "finite_or_no_weight",
    "grouped_mean",
    "log_mean_error",
    "log_mean_weight",
    "median_and_reach",
    "pareto_smooth",
    "reliable_shape",
    "resample",
    "standard_deviation",
    "student_factor",
    "truncated_weights",
    "weighted_mean",
    "weighted_mean_and_sd",
    "winsorize",
]
