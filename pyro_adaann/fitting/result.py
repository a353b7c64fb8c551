"""What `fit` returns: verdict, draws, evidence, predictions."""

from __future__ import annotations

import html
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_adaann.diagnostics.importance import WeightedDraws
from pyro_adaann.diagnostics.numbers import nats, percent, rounded
from pyro_adaann.diagnostics.rules import Finding, Level, findings
from pyro_adaann.diagnostics.verdict import Diagnosis
from pyro_adaann.fitting.chains import export_by_fit
from pyro_adaann.fitting.coordinates import Coordinates
from pyro_adaann.fitting.models import for_many_draws
from pyro_adaann.fitting.predictions import predict
from pyro_adaann.fitting.storage import Guide, read_result, write_result
from pyro_adaann.fitting.stored import StoredDraws, draws_by_guide
from pyro_adaann.fitting.summary import FitSummary, site_rows
from pyro_adaann.guides.base import AutoFlow
from pyro_adaann.sampling.missing import without_missing
from pyro_adaann.svi import AdaAnnSVI
from pyro_adaann.weights import weighted_mean

__all__ = ["FitResult", "FitSummary"]

#: Model, positional and keyword arguments.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, repr=False)
class FitResult:
    """Posterior draws of a model with a verdict; ``print`` it. Made by :func:`fit`.

    :param draws: draws with their weights against the posterior, as :func:`importance_draws` returns them.
    :param diagnosis: what the weights, the ladder and wider bases say.
    :param remarks: what else the verdict says, of several fits and of an early end.
    :param fits: what every fit found, the first one first.
    :param seconds: how long all of it took.
    :param guides: the guides whose draws they are, each with the same number of draws: those of the fits
        and, where it adds to these or agrees with them, a nested Laplace approximation; it alone where no
        flow was needed.
    :param svi: the driver of the best of these, for those who want to go on; None after :meth:`load`, and
        where no flow was needed.
    :param call: model and arguments; None after :meth:`load` without a model.
    :param centered: for sites of which guides have numbers decentered, a tensor of the site's shape that is 0
        for these and 1 for others. Guides and ``svi`` have a site ``"theta_decentered"`` in place of such a
        ``"theta"``; everything else here is of the model's own sites.

    Example::

        >>> import pyro, pyro.distributions as dist
        >>> from pyro_adaann import fit
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> result = fit(model, torch.tensor(1.0), seed=0, progress_bar=False)
        >>> round(float(result.mean("z")), 1), round(float(result.sd("z")), 1)  # exactly 0.5 and 0.71
        (0.5, 0.7)
        >>> round(result.log_evidence, 1)  # exactly log N(1; 0, 2) = -1.52
        -1.5
    """

    draws: WeightedDraws
    diagnosis: Diagnosis
    remarks: tuple[Finding, ...]
    fits: tuple[FitSummary, ...]
    seconds: float
    guides: tuple[Guide, ...] = ()
    svi: AdaAnnSVI | None = None
    call: Call | None = field(default=None)
    centered: dict[str, Tensor] = field(default_factory=dict)

    @property
    def level(self) -> Level:
        """How far the draws can be used."""
        return max([self.diagnosis.level, *(remark.level for remark in self.remarks)])

    @property
    def is_good(self) -> bool:
        """Whether nothing here speaks against using the draws."""
        return self.level == Level.GOOD

    @property
    def asks_for_weights(self) -> bool:
        """Whether the draws of the guides stand for the posterior under their weights alone.

        ``draws``, :meth:`sample` and all that is made of them have the weights in any case.
        """
        return self.level == Level.USABLE_WITH_WEIGHTS

    @property
    def verdict(self) -> str:
        """The verdict, a few sentences, the worst first."""
        found = findings(self.diagnosis)
        # Beside an alarm nothing is said of what draws or weights are good for.
        if self.level > max(self.diagnosis.level, Level.USABLE_WITH_WEIGHTS):
            found = [finding for finding in found if finding.level > Level.USABLE_WITH_WEIGHTS]
        elif self.level > self.diagnosis.level:
            found = [finding for finding in found if finding.level > Level.GOOD]
        ordered = sorted([*self.remarks, *found], key=lambda finding: -finding.level)
        return f"{self.level.headline}. {' '.join(finding.sentence for finding in ordered)}"

    @property
    def log_evidence(self) -> float:
        """The log evidence, in nats."""
        return self.diagnosis.log_evidence

    @property
    def log_evidence_se(self) -> float:
        """Its standard error, to be believed if the verdict is good or usable."""
        return self.diagnosis.log_evidence_se

    def mean(self, name: str) -> Tensor:
        """Return the posterior mean of a site."""
        return self.draws.mean(name)

    def sd(self, name: str) -> Tensor:
        """Return the posterior standard deviation of a site."""
        values = self.draws.samples[name].double()
        mean = weighted_mean(values, self.draws.log_weights)
        return weighted_mean((values - mean).square(), self.draws.log_weights).sqrt().to(mean.dtype)

    def sample(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Return posterior draws of equal weight, every site with its draws along a first dimension."""
        return self.draws.resample(num_samples)

    @torch.no_grad()
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log density of the mixture of the guides at values of all sites, ``(num_draws,)``.

        It is close to the log posterior density where the verdict is good.

        :raises ValueError: after :meth:`load` without a model, or if a site is missing.
        """
        model, args, kwargs = self._call("a density")
        values, log_scales = Coordinates(model, args, kwargs, self.centered).enter(values)
        densities = [guide.log_prob(values, *args, **kwargs) for guide in self.guides]
        # A point out of reach of a guide's inverse has no density there.
        found = torch.stack(densities)
        found = torch.where(found.isnan(), -torch.inf, found)
        log_density = found.logsumexp(0) - math.log(len(densities))
        # Nor is there one at the boundary, where a scale is zero.
        return torch.where(log_density > -torch.inf, log_density - log_scales.to(found), -torch.inf)

    def predictive(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Return posterior predictive draws: new data, and what the model computes (`pyro.deterministic`).

        :param args: arguments of the model, by default those of the fit; with ``kwargs``.
        :param num_samples: number of draws.
        :raises ValueError: after :meth:`load` without a model.
        """
        model, own_args, own_kwargs = self._call("predictions")
        if not (args or kwargs):
            args, kwargs = own_args, own_kwargs
        return predict(model, self.sample(num_samples), args, kwargs)

    def to_arviz(self, *, by_fit: bool = False, **kwargs: Any) -> Any:
        """Return the draws as data for ArviZ, weighted as the verdict demands.

        :param by_fit: make every fit a chain, weighted by itself, so that R-hat, ranks and traces compare
            them. By default there is one chain, of all fits together: with it parts that a fit lacks have
            their right share.
        :param kwargs: arguments of :func:`to_arviz`, such as ``num_samples`` (of every chain), ``coords`` or
            ``prior``.
        :raises ValueError: after :meth:`load` without a model, and as :func:`to_arviz` does.
        """
        from pyro_adaann.export.arviz import to_arviz

        model, own_args, own_kwargs = self._call("an export")
        weighted = self.level > Level.GOOD or (by_fit and len(self.guides) > 1)
        settings = {"weighted": weighted, "diagnosis": self.diagnosis, **kwargs}
        with pyro.get_param_store().scope():
            if by_fit:
                guides: Sequence[Any] = self.guides
                if self.centered:
                    coordinates = Coordinates(model, own_args, own_kwargs, self.centered)
                    guides = draws_by_guide(coordinates, self.guides, self.draws)
                is_flow = [isinstance(guide, AutoFlow) for guide in self.guides]
                guides = list(compress(guides, is_flow)) or guides
                data = export_by_fit(model, guides, own_args, own_kwargs, settings)
            elif len(self.guides) == 1 and not self.centered:
                svi = (model, self.guides[0]) if self.svi is None else self.svi
                data = to_arviz(svi, *own_args, **settings, **own_kwargs)
            else:
                guide = StoredDraws(model, self.draws, own_args, own_kwargs)
                data = to_arviz((model, guide), *own_args, **settings, **own_kwargs)
        data.attrs["verdict"] = self.level.headline
        return data

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write draws, evidence, verdict and guides to one file, whole or not at all.

        :raises OSError: if the disk refuses; what was at ``path`` is still there.
        """
        write_result(
            path,
            draws=self.draws,
            diagnosis=self.diagnosis,
            remarks=self.remarks,
            fits=self.fits,
            seconds=self.seconds,
            guides=self.guides,
            centered=self.centered,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Callable[..., Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> FitResult:
        """Return the result in a file of :meth:`save`; no code of the file is run.

        :param path: the file.
        :param model: the model, for densities, predictions and exports; draws need none.
        :param args: its arguments, with ``kwargs``.
        :raises ValueError: if the file is damaged, another kind of file, or of another model.
        """
        if model is not None:
            model = without_missing(model, args, kwargs)
        parts, guides = read_result(path, model, args, kwargs)
        if model is not None:
            fitted = Coordinates(model, args, kwargs, parts["centered"]).model
            at_once = for_many_draws(fitted, guides[0], args, kwargs)
            model = model if parts["centered"] else at_once
        call = None if model is None else (model, args, kwargs)
        return cls(**parts, guides=tuple(guides), svi=None, call=call)

    def _call(self, purpose: str) -> Call:
        if self.call is None:
            raise ValueError(
                f"Expected a result with its model, for {purpose}; got one that was loaded without. Use "
                f"FitResult.load(path, model, *args)."
            )
        return self.call

    def _facts(self) -> list[str]:
        """Return what there is to say in numbers, a line each; fits in the order of their evidence."""
        num, ess, k_hat = len(self.draws.log_weights), self.draws.ess, self.diagnosis.k_hat
        names = "fit" if len(self.fits) == 1 else "fits"
        facts = [
            f"log evidence {nats(self.log_evidence)} +- {nats(self.log_evidence_se)}",
            f"{num} weighted draws, {ess:.0f} effective ({percent(ess / num)}), k-hat {k_hat:.2f}",
            f"{len(self.fits)} {names} in {rounded(self.seconds)} s{self._decentered()}",
        ]
        if len(self.fits) > 1:
            ranked = sorted(enumerate(self.fits, 1), key=lambda item: -item[1].log_evidence)
            facts += [f"  fit {i}: {fit}" for i, fit in ranked]
        return facts

    def _decentered(self) -> str:
        """Return which sites have numbers that were fitted decentered, the end of a sentence."""
        parts = []
        for name, centered in self.centered.items():
            num_free = int((1 - centered).sum())
            parts.append(name if num_free == centered.numel() else f"{num_free} of {name}")
        return f", {', '.join(parts)} decentered" if parts else ""

    def __repr__(self) -> str:
        return (
            f"FitResult({self.level.headline}, log evidence {nats(self.log_evidence)} +- "
            f"{nats(self.log_evidence_se)}, {', '.join(self.draws.samples)})"
        )

    def __str__(self) -> str:
        verdict = textwrap.fill(f"Verdict: {self.verdict}", 88)
        rows = site_rows(self.draws)
        width = max(len(row[0]) for row in rows)
        table = ["  ".join([row[0].ljust(width), *(cell.rjust(9) for cell in row[1:])]) for row in rows]
        return "\n".join([verdict, "", *self._facts(), "", *table])

    def _repr_html_(self) -> str:
        headline, text = self.verdict.split(". ", 1)
        head, *body = site_rows(self.draws)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
        )
        names = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        facts = "<br>".join(html.escape(fact) for fact in self._facts())
        return (
            f"<p><b>{html.escape(headline)}.</b> {html.escape(text)}</p><p>{facts}</p>"
            f"<table><tr>{names}</tr>{rows}</table>"
        )
