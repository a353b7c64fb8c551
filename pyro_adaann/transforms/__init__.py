"""Normalizing flows as Pyro transforms: fast kernels, inverses at any point."""

from pyro_adaann.transforms.affine import AffineLayer
from pyro_adaann.transforms.base import FlowTransform
from pyro_adaann.transforms.compose import ComposedFlow
from pyro_adaann.transforms.fixed_affine import FixedAffine
from pyro_adaann.transforms.outer import OuterProducts
from pyro_adaann.transforms.planar import PlanarStack
from pyro_adaann.transforms.realnvp import RealNVPStack
from pyro_adaann.transforms.spline import SplineStack

__all__ = [
    "AffineLayer",
    "ComposedFlow",
    "FixedAffine",
    "FlowTransform",
    "OuterProducts",
    "PlanarStack",
    "RealNVPStack",
    "SplineStack",
]
