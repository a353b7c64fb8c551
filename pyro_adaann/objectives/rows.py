r"""A model run on a few of a batch's draws at a time.

A hundred thousand rows of data and five hundred draws are :math:`5 \cdot 10^7` log densities, and as many
numbers in every array on the way to them. Arrays of that size cost several times as much as the same
numbers in arrays that fit into a processor's cache, and more memory than many machines have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_adaann.objectives.sites import PARTICLE_PLATE
from pyro_adaann.objectives.traces import with_num_particles
from pyro_adaann.processes.group import process_count

__all__ = [
    "TooLarge",
    "join_rows",
    "most_draws",
    "numbers_per_draw",
    "refuse_large",
    "rows_of",
    "run_in_rows",
]

#: Numbers of a model's sites that are made at a time. Twice as many are slower on a CPU: they leave its
#: caches. A graphics card takes as many as its memory holds.
_MAX_NUMBERS, _MAX_NUMBERS_ELSEWHERE = 2**21, 2**28
#: Fewest draws at a time. A single one would look like a dimension that broadcasts.
_MIN_DRAWS = 2
#: Draws from which on a guide's time grows with their number.
_MIN_JOINED = 2500


class TooLarge(Exception):
    """A run of a model that would make too many numbers.

    :param num_draws: how many draws it should be run on instead.
    """

    def __init__(self, num_draws: int) -> None:
        super().__init__(f"at most {num_draws} draws at a time")
        self.num_draws = num_draws


def most_draws(numbers_per_draw: int, device: torch.device) -> int:
    """Return how many draws a model should be run on at a time."""
    most = _MAX_NUMBERS if device.type == "cpu" else _MAX_NUMBERS_ELSEWHERE
    return max(_MIN_DRAWS, most // max(numbers_per_draw, 1)) * process_count()


def numbers_per_draw(trace: Trace) -> int:
    """Return how many numbers the sites of a model have, by the trace of one run."""
    fns = [site["fn"] for site in trace.nodes.values() if site["type"] == "sample"]
    return sum(fn.shape().numel() for fn in fns if isinstance(fn, TorchDistributionMixin))


def refuse_large(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model that raises :class:`TooLarge` at the first site that is too much for all its draws."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Watch():
            return model(*args, **kwargs)

    return run


class _Watch(Messenger):
    """Counts the numbers that the sites of a model have for each draw."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers_per_draw = 0

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        num_draws = max((f.size for f in msg["cond_indep_stack"] if f.name == PARTICLE_PLATE), default=1)
        if not isinstance(fn, TorchDistributionMixin):
            return
        self._numbers_per_draw += fn.shape().numel() // num_draws
        most = most_draws(self._numbers_per_draw, msg["value"].device)
        if num_draws >= 2 * most:  # `run_in_rows` divides draws so that no part has twice as many
            raise TooLarge(most)


def run_in_rows(
    elbo: ELBO, model: Callable[..., Any], guide_trace: Trace, num_draws: int, args: Any, kwargs: Any
) -> Iterator[tuple[Trace, Trace]]:
    """Yield the traces of a model, without a graph, for ``num_draws`` of a guide's draws or more at a time.

    A part has fewer than twice as many.

    :param elbo: whose plate of particles the draws come from.
    :param guide_trace: the guide's, for all draws, with log densities.
    """
    total = elbo.num_particles
    num_runs = max(total // num_draws, 1)
    for i in range(num_runs):
        start, stop = total * i // num_runs, total * (i + 1) // num_runs
        part = with_num_particles(elbo, stop - start)
        rows = rows_of(guide_trace, start, stop)
        run = EnumMessenger(first_available_dim=-1 - part.max_plate_nesting)(
            part._vectorized_num_particles(model)
        )
        with torch.no_grad():
            replayed = poutine.replay(run, trace=rows)
            trace = prune_subsample_sites(poutine.trace(replayed).get_trace(*args, **kwargs))
            trace.compute_log_prob()
        rows.pack_tensors()
        trace.pack_tensors(rows.plate_to_symbol)
        yield trace, rows


def rows_of(guide_trace: Trace, start: int, stop: int) -> Trace:
    """Return the trace of some of the draws of a guide, off its graph."""
    result = Trace()
    for site in guide_trace.nodes.values():
        if site["type"] != "sample":
            continue
        kept = {name: site[name] for name in ("name", "type", "fn", "is_observed", "cond_indep_stack")}
        dim = next((f.dim for f in site["cond_indep_stack"] if f.name == PARTICLE_PLATE), None)
        parts = {name: site[name].detach() for name in ("value", "log_prob", "unscaled_log_prob")}
        if dim is not None:
            event_dims = {"value": site["fn"].event_dim}
            parts = {
                name: _narrow(part, dim - event_dims.get(name, 0), start, stop)
                for name, part in parts.items()
            }
        infer = {name: value for name, value in site["infer"].items() if name != "_dim_to_symbol"}
        kept |= {"infer": infer, "scale": site["scale"], "mask": None, "args": (), "kwargs": {}}
        result.add_node(site["name"], **{**kept, **parts})
    return result


def join_rows(traces: Iterable[tuple[Trace, int]]) -> Iterator[tuple[Trace, int]]:
    """Yield traces of a guide, joined to ones of some hundred draws, with the number of each.

    A large model leaves few draws to a trace, for which a flow takes as long as for hundreds.

    :param traces: the traces, with how many draws each holds. A single draw has no plate, and is not joined.
    """
    waiting: list[tuple[Trace, int]] = []
    for trace, num in traces:
        waiting.append((trace, num))
        total = sum(count for _, count in waiting)
        if num == 1 or total >= _MIN_JOINED:
            yield from _joined(waiting)
            waiting = []
    yield from _joined(waiting)


def _joined(traces: list[tuple[Trace, int]]) -> Iterator[tuple[Trace, int]]:
    several = [trace for trace, num in traces if num > 1]
    if len(several) < 2:
        yield from traces
        return
    result = several[0].copy()
    for name, site in result.nodes.items():
        dim = next((f.dim for f in site.get("cond_indep_stack", ()) if f.name == PARTICLE_PLATE), None)
        if site["type"] == "sample" and dim is not None:
            values = [trace.nodes[name]["value"] for trace in several]
            result.nodes[name] = {**site, "value": torch.cat(values, dim - site["fn"].event_dim)}
    yield result, sum(num for _, num in traces if num > 1)
    yield from ((trace, num) for trace, num in traces if num == 1)


def _narrow(values: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Return some rows of values, or all where they are the same for every row."""
    has_rows = values.dim() >= -dim and values.shape[dim] > 1
    return values.narrow(dim, start, stop - start) if has_rows else values
