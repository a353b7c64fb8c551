r"""Paths of tempered densities, and what a guide fitted on each of them targets.

With the log prior, the log likelihood and the log density of the guide's base, each in the
**unconstrained** coordinates z, the density at inverse temperature t is

.. math:: \log p_t(z) = w_\mathrm{prior}(t) \log p(z) + w_\mathrm{lik}(t) \log p(x \mid z)
          + w_\mathrm{base}(t) \log q_0(z),

where the weights go linearly in t from the path's own values at t = 0 to 1, 1 and 0. The loss is
:math:`E_q[w_\mathrm{ent}(t) \log q(z) - \log p_t(z)]`; the weight of the guide's own density is 1 on
every path but that of KL warm-up.

**What a path targets.** With a guide that can be any density, the loss at t has its minimum at
:math:`q \propto p_t^{1 / w_\mathrm{ent}}`. For a fixed model and alpha = beta = t that is

============  ==================  =============================================================
path          loss at t           target
============  ==================  =============================================================
joint         alpha-annealing     p(x, z)^alpha, wider than the posterior
likelihood                        p(z) p(x | z)^alpha, between prior and posterior
bridge                            q0(z)^(1 - t) p(x, z)^t, between the guide's base and posterior
kl_warmup     beta-annealing      p(z) p(x | z)^(1 / beta), **sharper** than the posterior
============  ==================  =============================================================

The first three are for inference in a given model. KL warm-up starts with the likelihood and raises the
weight of the prior later: it is for learning the model's own parameters (a VAE), not for finding modes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BRIDGE", "JOINT", "KL_WARMUP", "LIKELIHOOD", "Path", "get_path"]


@dataclass(frozen=True)
class Path:
    """A path of tempered densities, given by the weights at t = 0.

    The density there is ``prior^prior * likelihood^likelihood * base^base`` with the exponents given
    here, each in [0, 1]; the weights in between are linear in t.

    :param name: name of the path.
    :param prior: weight of the log prior at t = 0; it ends at 1.
    :param likelihood: weight of the log likelihood (observed, `pyro.factor` and model-enumerated
        sites) at t = 0; it ends at 1.
    :param base: weight of the log density of the guide's base at t = 0; it ends at 0.
    :param entropy: weight of the guide's own log density in the loss at t = 0; it ends at 1. Below 1
        the loss is no KL divergence to p_t, which adaptive schedules and losses made of importance
        weights need.

    Example::

        >>> Path("half a prior", prior=0.5, likelihood=0.0).prior_weight(0.5)
        0.75
    """

    name: str
    prior: float
    likelihood: float
    base: float = 0.0
    entropy: float = 1.0

    def prior_weight(self, inverse_temperature: float) -> float:
        """Weight of the log prior and of the Jacobians."""
        return self.prior + (1 - self.prior) * inverse_temperature

    def likelihood_weight(self, inverse_temperature: float) -> float:
        """Weight of the log likelihood."""
        return self.likelihood + (1 - self.likelihood) * inverse_temperature

    def base_weight(self, inverse_temperature: float) -> float:
        """Weight of the log density of the guide's base."""
        return self.base * (1 - inverse_temperature)

    def entropy_weight(self, inverse_temperature: float) -> float:
        """Weight of the log density of the guide."""
        return self.entropy + (1 - self.entropy) * inverse_temperature


#: p(x, z)^t: the paper's path, alpha-annealing. At t = 0 the density is flat.
JOINT = Path("joint", prior=0.0, likelihood=0.0)
#: p(z) p(x | z)^t: proper at every t if the prior is; at t = 0 it is the prior.
LIKELIHOOD = Path("likelihood", prior=1.0, likelihood=0.0)
#: q0(z)^(1 - t) p(x, z)^t: proper at every t; at t = 0 it is the base of the guide.
BRIDGE = Path("bridge", prior=0.0, likelihood=0.0, base=1.0)
#: The loss beta (log q(z) - log p(z)) - log p(x | z): beta-annealing, for models that learn. For a fixed
#: model its target is p(z) p(x | z)^(1 / beta), sharper than the posterior; at beta = 0 a point.
KL_WARMUP = Path("kl_warmup", prior=0.0, likelihood=1.0, entropy=0.0)

_PATHS = {path.name: path for path in (JOINT, LIKELIHOOD, BRIDGE, KL_WARMUP)}


def get_path(path: str | Path) -> Path:
    """Return the path of this name, or the path itself.

    :raises ValueError: if there is no path of this name.
    """
    if isinstance(path, Path):
        return path
    if path not in _PATHS:
        raise ValueError(f"Expected `path` to be one of {sorted(_PATHS)} or a Path; got {path!r}.")
    return _PATHS[path]
