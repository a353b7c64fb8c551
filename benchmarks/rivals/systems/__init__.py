"""The systems by name: which environment each runs in, and the function that runs it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OURS", "SYSTEMS", "System"]


@dataclass(frozen=True)
class System:
    """A system with its settings.

    :param function: ``module:function`` in this package; it takes target and seed, and returns an `Outcome`.
    :param environment: the name of its file in ``requirements/``; None for the environment of this package.
    :param version_of: the distribution whose version is noted.
    """

    function: str
    environment: str | None
    version_of: str


def _here(function: str, version_of: str = "pyro-adaann") -> System:
    return System(function, None, version_of)


SYSTEMS: dict[str, System] = {
    "AnnealedSMC": _here("ours:smc"),
    "blackjax SMC": System("blackjax_smc:run", "blackjax", "blackjax"),
    "NumPyro NUTS": System("numpyro_nuts:run", "numpyro", "numpyro"),
    "nautilus": System("nested:run_nautilus", "nautilus", "nautilus-sampler"),
    "PyMC Pathfinder": System("pymc_systems:pathfinder", "pymc", "pymc-extras"),
    "PyMC SMC": System("pymc_systems:smc", "pymc", "pymc"),
    "natural_svi": _here("ours:natural"),
    "fit": _here("ours:one_call"),
    "pocoMC": System("pocomc_smc:run", "pocomc", "pocomc"),
    "dynesty": System("nested:run_dynesty", "dynesty", "dynesty"),
    "Pyro SVI, IAF": _here("pyro_svi:iaf", "pyro-ppl"),
    "Pyro SVI, spline": _here("pyro_svi:spline", "pyro-ppl"),
    "flowMC": System("flowmc_flow:run", "flowmc", "flowMC"),
    "NumPyro NUTS, dense": System("numpyro_nuts:dense", "numpyro", "numpyro"),
    "AdaAnnSVI, published": _here("ours:adaann"),
    "LINFA": System("linfa_flow:run", "linfa", "linfa-vi"),
}
#: Those of this package.
OURS = tuple(name for name, system in SYSTEMS.items() if system.version_of == "pyro-adaann")
