"""What would go wrong on another device, found without one: calls made from the package's own frames."""

from __future__ import annotations

import contextlib
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_steps
import launches
import on_device
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal
from torch import Tensor
from torch.overrides import TorchFunctionMode

import pyro_adaann
from pyro_adaann import (
    AdaAnnSchedule,
    AdaAnnSVI,
    AnnealedSMC,
    AutoPlanar,
    AutoRealNVP,
    AutoSpline,
    ConstantSchedule,
    Ladder,
    NaturalStep,
    TraceMixedKL_ELBO,
    diagnose,
    find_lost_parts,
    importance_draws,
    mixture_draws,
    polish,
    resample,
    to_arviz,
)
from pyro_adaann.objectives.memory import LogFactorMemory
from pyro_adaann.objectives.replay import Replay
from pyro_adaann.state.checkpoint import read_checkpoint
from pyro_adaann.state.parameters import FitParameters

PACKAGE = str(Path(pyro_adaann.__file__).parent)
TORCH = str(Path(torch.__file__).parent)

#: Functions that make a tensor on torch's default device unless they are told another; `as_tensor` even moves
#: a tensor there.
FACTORIES = {
    *(
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "eye",
        "full",
        "linspace",
        "logspace",
        "normal",
        "ones",
        "rand",
        "randint",
        "randn",
    ),
    *("randperm", "tensor", "zeros"),
}
#: What brings numbers to the CPU: a graphics card is waited for.
MOVES = {"cpu", "numpy", "__array__"}
WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select"}

#: Modules of the package that may move tensors to the CPU, and why.
MAY_MOVE = {
    "annealing/schedules.py": "decides by dozens of numbers of a few hundred draws, once a stage: one copy",
    "export/arviz.py": "ArviZ holds NumPy arrays",
    "export/plots.py": "matplotlib draws NumPy arrays",
    "state/checkpoint.py": "a file is read on machines without the device",
    "state/stages.py": "as for schedules: one copy a stage",
    "transforms/kernels/planar_recursion.py": "runs in NumPy on the CPU alone, by views",
    "weights/pareto.py": "the fit of the tail is ArviZ's, in NumPy",
}
#: Modules that may make tensors on the default device, and why.
MAY_MAKE: dict[str, str] = {}


class Watch(TorchFunctionMode):
    """Note what the package's own frames ask of torch that another device would not bear, or wait for.

    A `with torch.device(...)` block of the package counts as a device: it fills in the argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FACTORIES and kwargs.get("device") is None and not _has_out_or_tensor(name, args, kwargs):
            self._note(self.made, name)
        elif name in MOVES or (name == "to" and _names_the_cpu(args, kwargs)):
            self._note(self.moved, name)
        elif name in WAITS or (name in ("__getitem__", "__setitem__") and _is_mask(args[1])):
            self._note(self.waited, name)
        return func(*args, **kwargs)

    def _note(self, where: Counter[str], name: str) -> None:
        frame = sys._getframe(2)
        # torch's own functions, such as a distribution made of plain numbers, act for their caller.
        while frame is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        if frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
            file = Path(frame.f_code.co_filename).relative_to(PACKAGE).as_posix()
            if not file.startswith("testing/"):
                where[f"{file}:{frame.f_lineno} {name}"] += 1

    def check(self) -> None:
        """Fail with the places where a device is not given, or left."""
        assert not _outside(self.made, MAY_MAKE), "Expected a device; these make tensors without one."
        assert not _outside(self.moved, MAY_MOVE), "Expected tensors to stay; these move them to the CPU."


def _has_out_or_tensor(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("out") is not None or (name == "normal" and any(isinstance(a, Tensor) for a in args))


def _names_the_cpu(args: Any, kwargs: dict[str, Any]) -> bool:
    found = [*args[1:], kwargs.get("device")]
    # By name: a device that is asked of another tensor is no move.
    return any(isinstance(a, str) and torch.device(a).type == "cpu" for a in found)


def _is_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype is torch.bool for part in parts)


def _outside(places: Counter[str], allowed: dict[str, str]) -> list[str]:
    return sorted(place for place in places if place.split(":")[0] not in allowed)


GUIDES: dict[str, Callable[[Any], Any]] = {
    "planar": lambda model: AutoPlanar(model, 4, base_scale=2.0),
    "realnvp": lambda model: AutoRealNVP(model, 2, [5], base_scale=2.0),
    "spline": lambda model: AutoSpline(model, 1, 4, [6], base_scale=2.0),
    "iaf": lambda model: AutoIAFNormal(model, hidden_dim=[5]),
    "normal": lambda model: AutoNormal(model, init_scale=0.5),
}
#: Pyro makes some of their parameters on torch's default device and in its default dtype.
PYROS = {"iaf", "normal"}
STEPS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "adam": lambda: (
        pyro.optim.Adam({"lr": 0.02}),
        Trace_ELBO(num_particles=20, vectorize_particles=True),
    ),
    "mixed": lambda: (pyro.optim.Adam({"lr": 0.02}), TraceMixedKL_ELBO(0.5, num_particles=20)),
    "natural": lambda: (NaturalStep(60, max_plate_nesting=1),),
}


def make_model(dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    """Two means, each observed three times; every tensor names its device."""
    like: Any = {"dtype": dtype, "device": "cpu"}
    data = torch.tensor([[-1.0, -0.4], [0.2, 0.8], [1.4, 2.0]], **like)
    prior_sd, sd = torch.full((2,), 2.0, **like), torch.full((2,), 0.5, **like)

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **like), prior_sd).to_event(1))
        with pyro.plate("data", 3, dim=-1, device="cpu"):
            pyro.sample("x", dist.Normal(z, sd).to_event(1), obs=data)

    return model


def make_fit(
    guide: str, step: str, dtype: torch.dtype = torch.float32, *, record_model: bool = False
) -> AdaAnnSVI:
    """A fit of some twenty steps, with a ladder."""
    model = make_model(dtype)
    path = "joint" if guide in PYROS else "bridge"
    return AdaAnnSVI(
        model,
        GUIDES[guide](model),
        *STEPS[step](),
        schedule=AdaAnnSchedule(2.0, initial_inverse_temperature=0.1),
        path=path,
        ladder=Ladder(),
        num_initial_steps=2,
        num_steps_per_stage=1,
        num_final_steps=3,
        record_model=record_model,
    )


def use_everything(guide: str, step: str, folder: Path, dtype: torch.dtype = torch.float32) -> AdaAnnSVI:
    """Fit, save, resume, and ask whatever can be asked of a fit."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make_fit(guide, step, dtype)
    for _ in range(3):
        svi.step()
    svi.save_checkpoint(folder / "fit.pt")
    pyro.clear_param_store()
    svi = make_fit(guide, step, dtype)
    svi.load_checkpoint(folder / "fit.pt")
    svi.run(progress_bar=False)
    diagnosis = diagnose(svi, num_samples=300)
    find_lost_parts(svi, num_samples=100)
    draws = importance_draws(svi, num_samples=300)
    draws.resample(50)
    draws.mean("z")
    mixture_draws(svi, num_samples=100)
    resample(draws.log_weights, 10, replacement=False)
    to_arviz(svi, num_samples=100, diagnosis=diagnosis)
    if guide not in PYROS:
        svi.guide.median()
        svi.guide.log_prob(svi.guide.sample_posterior(10))
    assert draws.samples["z"].dtype == dtype
    return svi


def use_samplers() -> None:
    """Sample from the prior, along the coordinates of a guide, and polish the guide."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = make_model()
    AnnealedSMC(model, num_particles=64).run(progress_bar=False)
    svi = make_fit("planar", "natural")
    svi.run(progress_bar=False)
    smc = AnnealedSMC(model, num_particles=64, guide=svi.guide, path="bridge")
    assert smc.run(progress_bar=False).samples["z"].device.type == "cpu"
    polish(svi, num_chains=2, num_samples=20, num_warmup=10, num_walkers=8, progress_bar=False)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("torch.zeros(3)", "made"),
        ("torch.as_tensor(torch.zeros(3, device='cpu'))", "made"),
        ("torch.distributions.Normal(0.0, 1.0, validate_args=False)", "made"),
        ("x.cpu()", "moved"),
        ("x.to('cpu')", "moved"),
        ("x.numpy()", "moved"),
        ("float(x[0])", "waited"),
        ("bool(x.any())", "waited"),
        ("x[x > 0].sum()", "waited"),
        ("torch.stack([x, x]).tolist()", "waited"),
    ],
)
def test_the_watch_sees_what_the_package_does_and_nobody_else(code, kind):
    x = torch.ones(2)
    for file, expected in ((f"{PACKAGE}/room/module.py", [f"room/module.py:1 {kind}"]), ("user.py", [])):
        with Watch() as watch:
            exec(compile(code, file, "exec"), {"torch": torch, "x": x})
        found = {"made": watch.made, "moved": watch.moved, "waited": watch.waited}
        assert {f"{p.split()[0]} {k}" for k, places in found.items() for p in places} == set(expected)


def test_a_device_of_a_block_counts_as_one_that_is_given():
    code = "with torch.device('cpu'): torch.zeros(3)"
    with Watch() as watch:
        exec(compile(code, f"{PACKAGE}/module.py", "exec"), {"torch": torch})
    assert not watch.made


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("guide", list(GUIDES))
@pytest.mark.filterwarnings("ignore::UserWarning")  # twenty steps leave much to warn of
def test_every_tensor_is_made_on_a_device_that_is_given_and_stays_there(guide, step, tmp_path):
    with Watch() as watch:
        use_everything(guide, step, tmp_path)
    watch.check()


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("guide", ["planar", "spline", "iaf"])
def test_a_recorded_model_stays_on_its_device(guide, step):
    with contextlib.nullcontext() if guide in PYROS else torch.device("meta"), Watch() as watch:
        svi = make_fit(guide, step, record_model=True)
        svi.run(progress_bar=False)
    assert not svi._fit.objective.recorder.reason
    watch.check()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_samplers_stay_on_the_device_of_the_model():
    with Watch() as watch:
        use_samplers()
    watch.check()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_samplers_beside_another_default_device():
    with torch.device("meta"):
        use_samplers()


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("guide", [name for name in GUIDES if name not in PYROS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_fit_beside_another_default_device(guide, step, tmp_path):
    """Tensors of the default device have no values here: one that is used ends the fit."""
    with torch.device("meta"):
        svi = use_everything(guide, step, tmp_path)
    assert {p.device.type for p in svi.guide.parameters()} == {"cpu"}


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("guide", [name for name in GUIDES if name not in PYROS])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_fit_in_double_precision_beside_single_precision(guide, step, tmp_path):
    svi = use_everything(guide, step, tmp_path, torch.float64)
    assert {p.dtype for p in svi.guide.parameters()} == {torch.float64}


def test_guides_of_pyros_in_the_precision_of_the_model():
    """Pyro makes their parameters in that of the model's values, networks in torch's default."""
    pyro.set_rng_seed(0)
    svi = make_fit("normal", "natural", torch.float64)
    svi.run(progress_bar=False)
    assert {p.dtype for p in svi.guide.parameters()} == {torch.float64}


#: Waits of a step: is a draw broken, is the gradient finite, are the parameters. Of a natural step with one
#: trial: the loss, the evidence, which replayed draws lack density, is a score infinite, is the system
#: solved, three times the validity of what guide and model draw from in the trial, is it accepted, are the
#: parameters finite.
MAX_WAITS = {"natural": 10, "adam": 3, "mixed": 3}


@pytest.mark.parametrize("record_model", [False, True])
@pytest.mark.parametrize("guide", ["planar", "realnvp", "spline"])
@pytest.mark.parametrize("step", list(STEPS))
def test_a_step_waits_for_few_numbers(guide, step, record_model):
    pyro.set_rng_seed(0)
    svi = make_fit(guide, step, record_model=record_model)
    while svi.inverse_temperature < 1:
        svi.step()
    before = svi.history.stages[-1].num_trials
    if record_model:
        (record,) = svi._fit.objective.recorder._records.values()
        record._num_uses = 64  # the next comparison is far
    with Watch() as watch:
        svi.step()
    assert svi.history.stages[-1].num_trials == before + 1
    assert watch.waited.total() <= MAX_WAITS[step], watch.waited


#: Operations of a step, as a card would launch them, with one trial of a natural step: as measured, and 3 %.
#: What is computed layer by layer or draw by draw again adds hundreds.
MAX_LAUNCHES: dict[tuple[str, str], int] = {
    ("planar 250", "adam"): 290,
    ("RealNVP 12 x 100", "adam"): 610,
    ("spline", "adam"): 680,
    ("planar 64", "natural"): 895,
    ("RealNVP 12 x 100", "natural"): 4_055,
    ("spline", "natural"): 5_960,
}
LARGE_GUIDES: dict[str, Callable[[Any], Any]] = {
    "planar 250": lambda model: AutoPlanar(model, 250),
    "planar 64": lambda model: AutoPlanar(model, 64),
    "RealNVP 12 x 100": lambda model: AutoRealNVP(model, 12, [100, 100]),
    "spline": AutoSpline,
}


@pytest.mark.parametrize(("guide", "step"), MAX_LAUNCHES)
def test_a_step_launches_few_operations(guide, step):
    """Whatever the number of layers and draws: each launch takes a card longer than a small operation."""
    model = gpu_steps.make_model(3, torch.device("cpu"))
    parts = gpu_steps.natural(20) if step == "natural" else gpu_steps.gradient(20)
    svi = AdaAnnSVI(model, LARGE_GUIDES[guide](model), *parts, schedule=ConstantSchedule(0.5))
    svi.step()
    svi.step()
    before = svi.history.stages[-1].num_trials
    count = launches.count_launches(svi.step, torch.device("cpu"))
    assert svi.history.stages[-1].num_trials == before + 1
    assert count <= MAX_LAUNCHES[guide, step]


def test_draws_of_a_checkpoint_follow_those_of_the_device():
    """What a checkpoint holds is read to the CPU; new draws are on the device of the model."""
    memory = LogFactorMemory(100)
    memory.restore([torch.zeros(2, 5)])
    memory.start_step()
    memory.add(torch.zeros(5, device="meta"), torch.zeros(5, device="meta"), 0.5)
    memory.end_step()
    assert {step.device.type for step in memory.steps(0.5)} == {"meta"}
    assert torch.cat(memory.steps(0.5), dim=1).shape == (2, 10)


def test_replayed_draws_of_a_checkpoint_follow_those_of_the_device():
    kept = [{"z": torch.zeros(5, 2)}, {"z": 0}, *(torch.zeros(5) for _ in range(3))]
    replay = Replay()
    replay.restore([kept, kept])
    replay.to(torch.device("meta"))
    for values, _, *numbers in replay.state():
        assert {value.device.type for value in (*values.values(), *numbers)} == {"meta"}


def test_state_of_a_checkpoint_goes_to_the_device_of_the_parameters(tmp_path):
    """A checkpoint is read to the CPU. What is on another device here has no values, and stays there."""
    svi = make_fit("planar", "adam")
    for _ in range(8):
        svi.step()
    svi.save_checkpoint(tmp_path / "fit.pt")
    state = read_checkpoint(tmp_path / "fit.pt")["parameters"]
    there = {
        name: torch.empty_like(value, device="meta").requires_grad_()
        for name, value in svi._fit.parameters.tensors.items()
        if name in state["optimizers"]
    }
    parameters = FitParameters(svi.model, lambda: None, svi._fit.step)
    parameters.optim = pyro.optim.Adam({"lr": 0.02})
    parameters.restore({**state, "values": {name: state["values"][name] for name in there}}, there)
    assert {p.device.type for p in parameters.tensors.values()} == {"meta"}
    for name, parameter in there.items():
        memory = parameters.optim.optim_objs[parameter].state[parameter]
        assert memory["exp_avg"].device.type == "meta", name
        assert memory["step"].device.type == "cpu", name  # as torch's own Adam has it


def test_benchmark_for_graphics_cards_runs_on_the_cpu(capsys):
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    main = runpy.run_path(str(path))["main"]
    assert main(["--device", "cpu", "--quick"]) == 0
    assert "natural, planar 20" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["meta", "nowhere", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(pytest.UsageError, match=f"one that computes here; got '{name}'"):
        on_device.find_device(name)


def test_another_device_runs_the_tests_that_bear_it():
    def item(*markers: str) -> Any:
        return SimpleNamespace(get_closest_marker=lambda name: name if name in markers else None)

    bears, other = item("any_device"), item("slow")
    assert on_device.find_device("cpu") == torch.device("cpu")
    assert on_device.select([bears, other], torch.device("cpu")) == ([bears, other], [])
    assert on_device.select([bears, other], torch.device("cuda")) == ([bears], [other])
