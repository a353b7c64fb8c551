"""A model that runs for many draws at once by running for one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, get_plates
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyro_adaann.objectives.of_rows import OfRows
from pyro_adaann.objectives.traces import marginal_log_density

__all__ = ["is_one_by_one", "one_by_one"]


def one_by_one(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that runs under a plate of draws, for one draw after the other.

    For models that index from the left (``z[0]``), multiply matrices (``x @ beta``), branch on a value, or
    call a module that knows no batches (``torch.nn.Linear`` with weights from a prior). Outside of a plate it
    is the model. Its time grows with the number of draws. :func:`fit` takes it by itself where it must.

    Discrete sites that are marked for enumeration are summed out in every run. What is observed is then, with
    them, one factor of a batch; predictions and exports run the model alone.

    :param model: a Pyro model whose sites are the same in every run.
    :raises ValueError: when it runs, if it has discrete latent sites that are not marked, if continuous ones
        depend on those that are, if sites, shapes or scales differ between draws, or if it is in several
        plates.

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


#: The site of all that is summed out or observed.
_FACTOR = "summed_out"


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
        #: Names of discrete sites that are summed out.
        self._enumerated = {name for name, site in self._sites() if site["infer"].get("enumerate")}
        self._drawn: list[Trace] | None = None

    def run(self) -> None:
        """Make every site once, for all draws."""
        for frame in {frame for _, site in self._sites() for frame in site["cond_indep_stack"]}:
            pyro.plate(frame.name, frame.size, dim=frame.dim)  # which makes a site of its own
        values: dict[str, Tensor] = {}
        latents: dict[str, OfRows] = {}
        for name, site in self._sites():
            if not site["is_observed"] and name not in self._enumerated:
                latents[name] = OfRows(site, self._num_rows, self._dim, self._draw(name, values))
                values[name] = self._sample(site, latents[name])
        is_summed = bool(self._enumerated)
        traces = [self._run_row(row, enumerates=is_summed) for row in self._rows_of(values)]
        for trace in traces:
            _check_names(trace, self._prototype)
        for name, fn in latents.items():
            fn.rows = [_checked(trace, name, self._prototype.nodes[name])["fn"] for trace in traces]
        if is_summed:
            total = torch.stack([_log_likelihood(trace, latents) for trace in traces])
            pyro.factor(_FACTOR, total.reshape(-1, *[1] * (-1 - self._dim)))
            return
        for name, site in self._sites():
            if name in latents:
                continue
            rows = [_checked(trace, name, site) for trace in traces]
            fn = OfRows(site, self._num_rows, self._dim, None)
            fn.rows = [row["fn"] for row in rows]
            value = fn.join([row["value"] for row in rows])
            if site["infer"].get("_deterministic"):
                with self._plates_of(site):
                    pyro.deterministic(name, value, event_dim=site["fn"].event_dim)
            else:
                self._sample(site, fn, obs=value)

    def _sites(self) -> list[tuple[str, Any]]:
        return [
            (name, site)
            for name, site in self._prototype.nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        ]

    def _sample(self, site: Any, fn: OfRows, obs: Tensor | None = None) -> Tensor:
        infer = {key: value for key, value in site["infer"].items() if key == "is_auxiliary"}
        with poutine.scale(scale=site["scale"]), self._plates_of(site):
            value: Tensor = pyro.sample(site["name"], fn, obs=obs, infer=infer)
        return value

    @staticmethod
    def _plates_of(site: Any) -> _Within:
        return _Within(tuple(frame for frame in site["cond_indep_stack"] if frame.vectorized))

    def _run_row(
        self, values: dict[str, Tensor], *, enumerates: bool = False, shows_parameters: bool = True
    ) -> Trace:
        """Run the model for one draw, of whose sites nobody outside sees more than the parameters.

        :param values: of latent sites.
        :param enumerates: whether discrete sites have all their values, and not one that is drawn.
        """
        seen = ["param"] if shows_parameters else []  # those that are seen are trained
        enumerating = self._enumerating() if enumerates else nullcontext()
        with poutine.block(expose_types=seen), poutine.trace() as tracer, enumerating, _Given(values):
            self._run()
        for site in tracer.trace.nodes.values():
            if site["type"] == "sample" and site["mask"] is not None:
                site["fn"], site["mask"] = site["fn"].mask(site["mask"]), None
        return tracer.trace

    @contextmanager
    def _enumerating(self) -> Iterator[None]:
        """Enumerate sites; the dimensions of an enumeration around it stay."""
        frames = [frame for _, site in self._sites() for frame in site["cond_indep_stack"]]
        before = copy.deepcopy(vars(_ENUM_ALLOCATOR))
        try:
            with EnumMessenger(first_available_dim=min([frame.dim for frame in frames], default=0) - 1):
                yield
        finally:
            vars(_ENUM_ALLOCATOR).update(before)

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


def _log_likelihood(trace: Trace, latents: Iterable[str]) -> Tensor:
    """Return the log density of a run but for that of its continuous sites, with discrete ones summed out."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    trace.pack_tensors()
    prior = sum(trace.nodes[name]["log_prob_sum"] for name in latents)
    return (marginal_log_density(trace, Trace()) - prior).reshape(())


def _refuse_discrete(trace: Trace) -> None:
    """Refuse latent sites with discrete values that are not to be summed out."""
    latents = [s for s in trace.nodes.values() if s["type"] == "sample" and not s["is_observed"]]
    names = [
        repr(site["name"])
        for site in latents
        if not site_is_subsample(site)
        and site["infer"].get("enumerate") != "parallel"
        and (site["infer"].get("enumerate") or site["fn"].support.is_discrete)
    ]
    if names:
        raise ValueError(
            f"Expected continuous latent sites, or discrete ones that are summed out, in a model that runs "
            f"for one draw after the other; got {', '.join(names)}. Mark them with "
            f'infer={{"enumerate": "parallel"}}.'
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
