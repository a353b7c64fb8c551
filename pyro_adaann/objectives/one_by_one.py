"""A model that runs for many draws at once by running for one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["is_one_by_one", "one_by_one"]


def one_by_one(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that runs under a plate of draws, for one draw after the other.

    For models that index from the left (``z[0]``), multiply matrices (``x @ beta``), branch on a value, or
    call a module that knows no batches (``torch.nn.Linear`` with weights from a prior). Outside of a plate it
    is the model. Its time grows with the number of draws. :func:`fit` takes it by itself where it must.

    :param model: a Pyro model whose sites are the same in every run, without discrete latent sites.
    :raises ValueError: when it runs, if it has discrete latent sites, if sites, shapes or scales differ
        between draws, or if it is in several plates.

    Example::

        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_adaann import AutoSpline, natural_svi
        >>> pyro.clear_param_store()  # a new fit
        >>> x, y = torch.eye(3)[:, :2], torch.tensor([1.0, 2.0, 3.0])
        >>> def model():
        ...     beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)
        >>> svi = natural_svi(one_by_one(model), AutoSpline(model), num_particles=20)
        >>> svi.step() < 10
        True
    """
    return _OneByOne(model)


def is_one_by_one(model: Callable[..., Any]) -> bool:
    """Whether a model is one of :func:`one_by_one`."""
    return isinstance(model, _OneByOne)


class _OneByOne:
    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frames = get_plates()
        if not frames:
            return self._model(*args, **kwargs)
        if len(frames) > 1:
            raise ValueError(
                f"Expected one plate of draws around a model that runs for one after the other; got "
                f"{', '.join(repr(frame.name) for frame in frames)}."
            )
        (frame,) = frames
        return _Rows(lambda: self._model(*args, **kwargs), frame.size, frame.dim).run()


class _Rows:
    """Runs of a model, one a draw, and the sites of all of them.

    :param run: runs the model.
    :param num_rows: number of draws.
    :param dim: dimension of their plate.
    """

    def __init__(self, run: Callable[[], Any], num_rows: int, dim: int) -> None:
        self._run, self._num_rows, self._dim = run, num_rows, dim
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the draws are as without it
            self._prototype = self._run_row({}, shows_parameters=False)
        _refuse_discrete(self._prototype)
        self._drawn: list[Trace] | None = None

    def run(self) -> None:
        """Make every site once, for all draws."""
        for frame in {frame for _, site in self._sites() for frame in site["cond_indep_stack"]}:
            pyro.plate(frame.name, frame.size, dim=frame.dim)  # which makes a site of its own
        values: dict[str, Tensor] = {}
        latents: dict[str, _OfRows] = {}
        for name, site in self._sites():
            if not site["is_observed"]:
                latents[name] = _OfRows(site, self._num_rows, self._dim, self._draw(name, values))
                values[name] = self._sample(site, latents[name])
        traces = [self._run_row(row) for row in self._rows_of(values)]
        for trace in traces:
            _check_names(trace, self._prototype)
        for name, site in self._sites():
            rows = [_checked(trace, name, site) for trace in traces]
            if name in latents:
                latents[name].rows = [row["fn"] for row in rows]
                continue
            fn = _OfRows(site, self._num_rows, self._dim, None)
            fn.rows = [row["fn"] for row in rows]
            value = fn.join([row["value"] for row in rows])
            if site["infer"].get("_deterministic"):
                pyro.deterministic(name, value, event_dim=site["fn"].event_dim)
            else:
                self._sample(site, fn, obs=value)

    def _sites(self) -> list[tuple[str, Any]]:
        return [
            (name, site)
            for name, site in self._prototype.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]

    def _sample(self, site: Any, fn: _OfRows, obs: Tensor | None = None) -> Tensor:
        infer = {key: value for key, value in site["infer"].items() if key == "is_auxiliary"}
        frames = tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized)
        with poutine.scale(scale=site["scale"]), _Within(frames):
            value: Tensor = pyro.sample(site["name"], fn, obs=obs, infer=infer)
        return value

    def _run_row(self, values: dict[str, Tensor], *, shows_parameters: bool = True) -> Trace:
        """Run the model for one draw, of whose sites nobody outside sees more than the parameters.

        :param values: of latent sites.
        """
        seen = ["param"] if shows_parameters else []  # those that are seen are trained
        with poutine.block(expose_types=seen), poutine.trace() as tracer, _Given(values):
            self._run()
        for site in tracer.trace.nodes.values():
            if site["type"] == "sample" and site["mask"] is not None:
                site["fn"], site["mask"] = site["fn"].mask(site["mask"]), None
        return tracer.trace

    def _rows_of(self, values: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Return the values of every draw."""
        columns = {}
        for name, value in values.items():
            shape = self._prototype.nodes[name]["value"].shape
            # The draws are leftmost; how many ones are between them and the shape depends on who gives them.
            is_shared = value.numel() == shape.numel()
            rows = value.reshape(1, *shape).expand((self._num_rows, *shape)) if is_shared else value
            columns[name] = rows.reshape(self._num_rows, *shape).unbind(0)
        return [{name: column[i] for name, column in columns.items()} for i in range(self._num_rows)]

    def _draw(self, name: str, values: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
        """Return what draws a latent site that nobody gives, and those after it, by the model itself."""

        def draw() -> list[Tensor]:
            if self._drawn is None:
                rows = self._rows_of(values) if values else [{}] * self._num_rows
                self._drawn = [self._run_row(row) for row in rows]
            return [trace.nodes[name]["value"] for trace in self._drawn]

        return draw


class _Within(Messenger):
    """Notes that sites are in plates, without opening these: a model may be run, and open them, meanwhile.

    :param frames: of the plates.
    """

    def __init__(self, frames: tuple[Any, ...]) -> None:
        super().__init__()
        self._frames = frames

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = self._frames + msg["cond_indep_stack"]


class _Given(Messenger):
    """Gives latent sites the values of a draw."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._values:
            msg["value"], msg["done"] = self._values[msg["name"]], True


class _OfRows(TorchDistribution):
    """The distributions of one site in all runs.

    :param site: the site in one run.
    :param num_rows: number of draws.
    :param dim: dimension of their plate.
    :param draw: draws all rows, where they depend on what was not known when the site was made.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, site: Any, num_rows: int, dim: int, draw: Callable[[], list[Tensor]] | None) -> None:
        self._fn, self._dim, self._draw = site["fn"], dim, draw
        self.rows: Sequence[Any] = ()
        batch_shape = self._fn.batch_shape
        free = -1 - dim - len(batch_shape)
        if free < 0:
            raise ValueError(
                f"Expected every dimension of site {site['name']!r} to the right of dimension {dim} of the "
                f"draws; got batch shape {tuple(batch_shape)}. Declare it by plates or by to_event."
            )
        super().__init__(
            torch.Size([num_rows, *[1] * free, *batch_shape]), self._fn.event_shape, validate_args=False
        )

    @property
    def support(self) -> Any:
        return self._fn.support

    @property
    def has_rsample(self) -> bool:
        return bool(self._fn.has_rsample)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(f"Expected batch shape {tuple(self.batch_shape)}; got {tuple(batch_shape)}.")
        return self

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Return values of all rows as a batch."""
        value = torch.stack([row.expand(self._fn.shape()) for row in rows])
        return value.reshape(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        if sample_shape:
            raise ValueError(f"Expected one value of every draw; got sample_shape {tuple(sample_shape)}.")
        return self.join(self._draw() if self._draw else [fn() for fn in self.rows])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        full = value.expand(self.batch_shape + self.event_shape)
        by_row = full.movedim(self._dim - len(self.event_shape), 0)
        values = by_row.reshape(len(self.rows), *self._fn.shape())  # that of a factor has no numbers
        rows = [fn.log_prob(own) for fn, own in zip(self.rows, values, strict=True)]
        return torch.stack([row.expand(self._fn.batch_shape) for row in rows]).reshape(self.batch_shape)


def _refuse_discrete(trace: Trace) -> None:
    """Refuse latent sites with discrete values, which would have to be summed out in every run."""
    latents = [s for s in trace.nodes.values() if s["type"] == "sample" and not s["is_observed"]]
    names = [
        repr(site["name"])
        for site in latents
        if not site_is_subsample(site) and (site["infer"].get("enumerate") or site["fn"].support.is_discrete)
    ]
    if names:
        raise ValueError(
            f"Expected continuous latent sites, in a model that runs for one draw after the other; got "
            f"{', '.join(names)}. Sum discrete ones out by hand, or let the model run for many draws at once."
        )


def _check_names(trace: Trace, prototype: Trace) -> None:
    """Refuse a run with other sites than the first."""
    names, expected = ({n for n, s in t.nodes.items() if s["type"] == "sample"} for t in (trace, prototype))
    if names != expected:
        raise ValueError(
            f"Expected the same sites in the run of every draw; got {sorted(names ^ expected)} in some "
            f"alone. Sites that depend on the draw cannot be fitted by a flow."
        )


def _checked(trace: Trace, name: str, site: Any) -> Any:
    """Return the site of a run, which has to be like that of the first."""
    row = trace.nodes[name]
    if row["fn"].shape() != site["fn"].shape() or not _is_same(row["scale"], site["scale"]):
        raise ValueError(
            f"Expected site {name!r} with shape {tuple(site['fn'].shape())} and scale {site['scale']} in the "
            f"run of every draw; got shape {tuple(row['fn'].shape())} and scale {row['scale']}."
        )
    return row


def _is_same(scale: float | Tensor, other: float | Tensor) -> bool:
    """Whether two scales, numbers or tensors, are alike."""
    one, two = torch.as_tensor(scale), torch.as_tensor(other)
    return one.shape == two.shape and bool((one == two).all())
