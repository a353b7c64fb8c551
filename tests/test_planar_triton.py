"""The Triton kernels of planar layers, on the CPU: run by Triton's interpreter, and compiled for a card."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_adaann.transforms.kernels import planar_recursion
from pyro_adaann.transforms.kernels.planar import PlanarFunction, constrain, point_gradients, score

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: it comes with torch for CUDA", allow_module_level=True)

KERNELS = Path(planar_recursion.__file__).parent
#: (points, layers, dimension): one of each; blocks that are not full; more than one block of layers.
SHAPES = [(1, 1, 1), (70, 9, 2), (17, 34, 3), (5, 4, 150)]
#: Relative to one plus the largest number: rounding, which the layers amplify.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5}


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The module, with a Triton that interprets: which it does is decided when it is first imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("pyro_adaann.transforms.kernels.planar_triton")


def make_stack(num_points: int, num_layers: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return points, u, w, b, and gradients of image and log-determinant."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, num_points, dim)
    u, w = torch.randn(2, num_layers, dim) / dim**0.5
    numbers = [x, 0.5 * u, w, torch.randn(num_layers), grad, torch.randn(num_points)]
    return [tensor.to(dtype) for tensor in numbers]


def everything(
    x: Tensor, u: Tensor, w: Tensor, b: Tensor, grad: Tensor, grad_log: Tensor
) -> dict[str, Tensor]:
    """Return whatever the recursions are for."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, u, w, b)]
    y, log_det = PlanarFunction.apply(*inputs)
    by_input = torch.autograd.grad((y, log_det), inputs, (grad, grad_log))
    by_point = point_gradients(x, u, w, b, grad, -1.0)
    return {
        "image": y.detach(),
        "log det": log_det.detach(),
        **dict(zip(["by x", "by u", "by w", "by b"], by_input, strict=True)),
        **by_point,
        "score": score(x, -x, constrain(u, w), w, b),
    }


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_give_what_torch_gives(shape, dtype, kernels, monkeypatch):
    stack = make_stack(*shape, dtype)
    expected = everything(*stack)
    monkeypatch.setattr(planar_recursion, "_kernels_for", lambda points: kernels)
    found = everything(*stack)
    for what, value in expected.items():
        assert found[what].dtype == dtype
        difference = (found[what] - value).abs().max() / (1 + value.abs().max())
        assert difference < TOLERANCE[dtype], what


def test_a_direction_is_one_launch(kernels, monkeypatch):
    launches: list[Any] = []
    launch = kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, *args: launches.append(kernel) or launch(kernel, *args)
    )
    monkeypatch.setattr(planar_recursion, "_kernels_for", lambda points: kernels)
    x, u, w, b, *_ = make_stack(3, 30, 2, torch.float64)
    y, log_det = PlanarFunction.apply(x, u.requires_grad_(), w, b)
    assert launches == [kernels._activations]
    (y.sum() + log_det.sum()).backward()
    assert launches == [kernels._activations, kernels._adjoint]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter is NumPy
def test_a_point_that_is_not_finite_spoils_no_other(kernels):
    x, u, w, b, *_ = make_stack(40, 5, 2, torch.float32)
    x[3], x[7] = torch.nan, torch.inf
    h = kernels.activations(x.t(), u, w, b)
    others = torch.tensor([i for i in range(40) if i not in (3, 7)])
    assert h[:, 3].isnan().all()
    assert torch.equal(h[:, others], kernels.activations(x[others].t(), u, w, b))


COMPILE = """
import runpy, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
names = runpy.run_path("planar_triton.py")
sizes, numbers = {"block": 32, "width": 4}, dict.fromkeys(["num_points", "num_layers", "dim"], "i32")
for kernel, precision in (names["_activations"], "fp32"), (names["_adjoint"], "fp64"):
    pointers = [name for name in kernel.arg_names if name not in sizes and name not in numbers]
    signature = dict.fromkeys(pointers, f"*{precision}") | numbers | dict.fromkeys(sizes, "constexpr")
    source = ASTSource(kernel, signature, constexprs=sizes)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=names["_OPTIONS"])
    print(precision, len(code.asm["cubin"]))
"""


def test_kernels_compile_for_a_card(tmp_path):
    """Down to the machine code of an H100, without one. In a process whose Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, env=environment, cwd=KERNELS, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["fp32", "fp64"]


def test_points_on_the_cpu_do_without_triton():
    assert planar_recursion._kernels_for(torch.zeros(2, 3)) is None


def test_triton_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("PYRO_ADAANN_TRITON", "0")
    assert planar_recursion._kernels.__wrapped__(torch.device("cpu")) is None


def test_kernels_that_work_are_taken(kernels):
    assert planar_recursion._kernels.__wrapped__(torch.device("cpu")) is kernels


def test_without_a_compiler_layers_are_computed_one_by_one(kernels, monkeypatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "activations", fail)
    with pytest.warns(UserWarning, match="got RuntimeError: Failed to find C compiler"):
        assert planar_recursion._kernels.__wrapped__(torch.device("cpu")) is None
