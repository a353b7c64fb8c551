"""The base class of flows: one batched kernel, a cached log-determinant, copies without the cache."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_adaann.transforms.by_point import gradients_by_point
from pyro_adaann.transforms.outer import OuterProducts
from pyro_adaann.transforms.recorded import Results, can_record, run_recorded
from pyro_adaann.transforms.recorded_map import RecordedMap, mapped

__all__ = ["FlowTransform"]


class FlowTransform(TransformModule):
    """A trainable bijection of R^d whose kernel works on a flat batch of points.

    A new flow implements two methods on matrices of shape ``(num_points, input_dim)``:
    :meth:`_forward` returns the image and ``log|det J|``, computed together, and :meth:`_backward_map` the
    inverse image. Both must be differentiable in
    the points and in the parameters.

    The last pair (x, y) and its log-determinant are remembered, so that sampling and scoring a
    draw costs one pass. The memory is dropped when a parameter changes, or where gradients are wanted
    of what was computed without a graph, and is neither copied nor pickled.

    :param input_dim: the dimension d of the points.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    #: Sign of the Jacobian determinant, which a flow that starts near the identity keeps.
    sign = 1
    #: Whether the inverse is exact and costs about as much as the map itself.
    has_closed_inverse = False
    #: Whether the operations of all methods, of the inverse if it is closed, depend on the number of points
    #: alone and can be recorded on a graphics card.
    is_recordable = False

    _cached_x_y: Any
    _cached_log_det: Tensor | None
    _cached_image: Tensor | None
    _cached_with_graph: bool

    def __init__(self, input_dim: int) -> None:
        super().__init__(cache_size=1)
        self.input_dim = input_dim
        self._forget()

    @abstractmethod
    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image ``(num_points, d)`` of ``x`` and ``log|det dy/dx|``, ``(num_points,)``."""

    @abstractmethod
    def _backward_map(self, y: Tensor) -> Tensor:
        """Return the point ``(num_points, d)`` whose image is ``y``."""

    def _backward_with_log_det(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Do :meth:`_backward_map`; also return ``log|det dy/dx|`` there if that is cheaper than a pass."""
        return self._backward_map(y), None

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` of shape ``(..., d)``; also return ``log|det dy/dx|`` of shape ``(...)``."""
        y, log_det = self._map(x.reshape(-1, self.input_dim))
        return y.reshape(x.shape), log_det.reshape(x.shape[:-1])

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do :meth:`_forward`, on a graphics card from a record."""
        if not (self.is_recordable and can_record(x)):
            return self._forward(x)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (x.requires_grad or trained):
            found: tuple[Tensor, Tensor] = RecordedMap.apply(self, x, *trained)
            return found
        return mapped(self, x)

    def _by_row(self, name: str, function: Callable[..., Results], *points: Tensor) -> Results:
        """Run a function of single points without a graph, on a graphics card from a record."""
        if not (self.is_recordable and can_record(points[0])):
            return function(*points)
        return run_recorded(self, name, function, points, by_row=True)

    def score(self, x: Tensor, base_score: Tensor) -> Tensor:
        r"""Return :math:`\nabla_y \log q(y)` at the images y of given points, without a graph.

        .. math:: \nabla_y \log q(y) = J^{-\top} \nabla_x (\log q_0(x) - \log|\det J(x)|)

        :param x: points, shape ``(..., d)``.
        :param base_score: :math:`\nabla_x \log q_0(x)`, likewise.
        """
        flat = x.detach().reshape(-1, self.input_dim)

        def run(x: Tensor, base_score: Tensor) -> Results:
            return {"score": self._score(x, base_score)}

        found = self._by_row("score", run, flat, base_score.detach().reshape(flat.shape))
        return cast(Tensor, found["score"]).reshape(x.shape)

    def _score(self, x: Tensor, base_score: Tensor) -> Tensor:
        """Do :meth:`score` on a flat batch; by the inverse map unless a flow overrides it."""
        with torch.no_grad():
            y = self._forward(x)[0]
        with torch.enable_grad():
            y.requires_grad_()
            inverse = self._backward_map(y)
            log_det = self._forward(inverse)[1]
            # The gradient of log q0 at the inverse image is given; the rest is the chain rule.
            total = (base_score * inverse).sum() - log_det.sum()
            return torch.autograd.grad(total, y)[0]

    def point_gradients(self, x: Tensor, base_score: Tensor) -> dict[Tensor, Tensor | OuterProducts]:
        r"""Return the gradient of the log density at every image of a point, held fixed, in every parameter.

        .. math:: \nabla_\phi \log q_\phi(y) = -\nabla_\phi (s \cdot y_\phi(x) + \log|\det J_\phi(x)|)

        with s the :meth:`score`, held fixed too; autograd gives its sum over points alone.

        :param x: points, shape ``(..., d)``; n of them in all.
        :param base_score: :math:`\nabla_x \log q_0(x)`, likewise.
        :return: for every parameter that is trained a tensor of shape ``(n,) + its shape``; or, for the
            matrix of a linear map, the factors of one: :class:`~pyro_adaann.transforms.outer.OuterProducts`.
        """
        flat = x.detach().reshape(-1, self.input_dim)
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}

        def run(x: Tensor, base_score: Tensor) -> Results:
            return self._density_gradients(x, base_score)[2]

        found = self._by_row("point gradients", run, flat, base_score.detach().reshape(flat.shape))
        return {parameter: found[name] for name, parameter in trained.items()}

    def _density_gradients(
        self, x: Tensor, base_score: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | OuterProducts]]:
        """Return the images of a flat batch, the :meth:`score` there and :meth:`point_gradients` by name."""
        with torch.no_grad():
            y = self._forward(x)[0]
        score = self._score(x, base_score)
        return y, score, self._point_gradients(x, -score, -1.0)

    def _point_gradients(
        self, x: Tensor, grad_y: Tensor, grad_log_det: float
    ) -> dict[str, Tensor | OuterProducts]:
        r"""Return :math:`\nabla_\phi (g \cdot y_\phi(x) + c \log|\det J_\phi(x)|)` of every point, by name.

        With hooks unless a flow overrides it.

        :param grad_y: g of every point.
        :param grad_log_det: c.
        """

        def run() -> Tensor:
            y, log_det = self._define(x)
            return (grad_y * y).sum(-1) + grad_log_det * log_det

        return gradients_by_point(self, run, len(x))

    def parameter_units(self) -> dict[Tensor, Tensor]:
        """Return for every parameter what counts as a large change of it, in its shape; here 1."""
        return {parameter: torch.ones_like(parameter) for parameter in self.parameters()}

    def _define(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Do :meth:`_forward` in ordinary operations, which function transforms of torch see through."""
        return self._forward(x)

    def __call__(self, x: Tensor) -> Tensor:
        self._forget_if_updated()
        return super().__call__(x)

    def _call(self, x: Tensor) -> Tensor:
        image, log_det = self._map(x.reshape(-1, self.input_dim))
        self._cached_image, self._cached_log_det = image, log_det.reshape(x.shape[:-1])
        self._cached_with_graph = torch.is_grad_enabled()
        return image.view(x.shape)

    def recall(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the point, image and ``log|det dy/dx|`` of the pass that has made ``y``, if remembered.

        The image has the values of ``y`` and is another tensor of the same graph: hooks on the
        gradient of ``y`` do not see what goes through it.
        """
        self._forget_if_updated()
        x_cached, y_cached = self._cached_x_y
        if y is not y_cached or self._cached_image is None or self._cached_log_det is None:
            return None
        return x_cached, self._cached_image.view(y.shape), self._cached_log_det

    def remember(self, x: Tensor, y: Tensor) -> None:
        """Take it that ``y`` is the image of ``x``, as if it had just been inverted without a graph."""
        self._forget_if_updated()
        self._cached_x_y = (x, y)
        self._cached_image = self._cached_log_det = None
        self._cached_with_graph = False

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget_if_updated()
        return super()._inv_call(y)

    def _inverse(self, y: Tensor) -> Tensor:
        self._cached_image = self._cached_log_det = None
        self._cached_with_graph = torch.is_grad_enabled()
        flat = y.reshape(-1, self.input_dim)
        if torch.is_grad_enabled() or not self.has_closed_inverse:
            return self._backward_map(flat).reshape(y.shape)

        def run(y: Tensor) -> Results:
            x, log_det = self._backward_with_log_det(y)
            return {"x": x} if log_det is None else {"x": x, "log_det": log_det}

        found = cast(dict[str, Tensor], self._by_row("inverse", run, flat))
        if "log_det" in found:
            self._cached_log_det = found["log_det"].reshape(y.shape[:-1])
        return found["x"].reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log|det dy/dx|`` of shape ``(...)`` for points of shape ``(..., d)``."""
        self._forget_if_updated()
        x_cached, y_cached = self._cached_x_y
        if x is x_cached and y is y_cached and self._cached_log_det is not None:
            return self._cached_log_det
        return self.forward_and_log_det(x)[1]

    def _forget(self) -> None:
        self._cached_x_y = (None, None)
        self._cached_image = self._cached_log_det = None
        self._cached_with_graph = False
        self._cached_versions: tuple[int, ...] = ()

    def _forget_if_updated(self) -> None:
        # An optimizer changes parameters in place; torch's cache compares the points alone.
        # (Not `self.parameters()`, which is ten times slower: this is asked three times a step.)
        versions = tuple(
            parameter._version
            for module in self.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        )
        is_bare = torch.is_grad_enabled() and not self._cached_with_graph
        if versions != self._cached_versions or is_bare:
            self._forget()
            self._cached_versions = versions

    def __getstate__(self) -> dict[str, Any]:
        # A cached draw hangs on a graph, and Pyro's parameter store leaves weak references on the
        # parameters: neither can be pickled.
        state = self.__dict__.copy()
        state.update(
            _inv=None,
            _cached_x_y=(None, None),
            _cached_image=None,
            _cached_log_det=None,
            _cached_with_graph=False,
            _cached_versions=(),
        )
        for name in ("_parameters", "_modules"):
            state[name] = copy.deepcopy(state[name])
        return state
