"""Normalizing flows as Pyro transforms: fast kernels, inverses at any point."""

from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.planar import PlanarStack
from pyro_adaann.transforms.realnvp import RealNVPStack

__all__ = ["FlowTransform", "PlanarStack", "RealNVPStack"]
