"""Checkpoints: a resumed fit is the fit that was never killed, and no file is ever half written."""

from __future__ import annotations

import builtins
import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import conjugate_normal, plated
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_adaann import AdaAnnSchedule, AdaAnnSVI, AutoPlanar, AutoRealNVP, LinearSchedule
from pyro_adaann.state.checkpoint import read_checkpoint, write_checkpoint

DATA = torch.tensor([0.3, -1.2, 2.0, 0.7])
NUM_STEPS = 30


def adam(lr: float = 0.01) -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": lr})


def step_lr() -> pyro.optim.PyroOptim:
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "step_size": 3, "gamma": 0.5}
    return pyro.optim.StepLR(options)


def multi_step_lr() -> pyro.optim.PyroOptim:
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "milestones": [2, 5, 5]}
    return pyro.optim.MultiStepLR(options)


def plateau() -> pyro.optim.PyroOptim:
    options = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4, "momentum": 0.9}, "patience": 2}
    return pyro.optim.ReduceLROnPlateau(options)


#: Model, guide, optimizer and further arguments of the fits that are killed.
FITS = {
    "planar": (plated, lambda m: AutoPlanar(m, 3), adam, {}),
    "realnvp": (plated, lambda m: AutoRealNVP(m, 2, [5, 5]), adam, {}),
    "normal": (plated, AutoNormal, lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.99}), {}),
    "planar, lr": (plated, lambda m: AutoPlanar(m, 3), step_lr, {"lr_schedule": "always"}),
    "realnvp, lr": (plated, lambda m: AutoRealNVP(m, 2, [5, 5]), multi_step_lr, {}),
    "planar, plateau": (plated, lambda m: AutoPlanar(m, 3), plateau, {"lr_schedule": "always"}),
    "planar, subsample": (partial(plated, subsample_size=2), lambda m: AutoPlanar(m, 3), step_lr, {}),
    "realnvp, subsample": (
        partial(plated, subsample_size=2),
        lambda m: AutoRealNVP(m, 2, [5]),
        adam,
        {"num_variance_samples": 10},
    ),
}


def make(name: str, seed: int) -> AdaAnnSVI:
    """Build a fit as a new process would."""
    model, make_guide, make_optim, options = FITS[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return AdaAnnSVI(
        model,
        make_guide(model),
        make_optim(),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
        schedule=AdaAnnSchedule(1.0, initial_inverse_temperature=0.05),
        num_initial_steps=5,
        num_steps_per_stage=3,
        num_final_steps=9,
        **options,
    )


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(svi: AdaAnnSVI, num_steps: int) -> None:
    step = svi.step

    def killed(*args: object) -> float:
        if svi.history.num_steps == num_steps:
            raise Killed
        return step(*args)

    svi.step = killed


def parameters(svi: AdaAnnSVI) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in svi._fit.parameters.tensors.items()}


@pytest.mark.parametrize("name", list(FITS))
def test_a_killed_and_resumed_fit_is_the_one_never_killed(name, tmp_path):
    assert_resumes(name, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FITS))
def test_a_fit_killed_at_twenty_points(name, tmp_path):
    assert_resumes(name, 20, tmp_path)


def assert_resumes(name: str, num_points: int, tmp_path: Path) -> None:
    whole = make(name, 0)
    whole.run(DATA, progress_bar=False, num_steps=NUM_STEPS)
    losses, values = whole.history.losses, parameters(whole)
    assert len(losses) == NUM_STEPS
    assert len(whole.history.stages) > 3
    for point in random.Random(name).sample(range(1, NUM_STEPS), num_points):
        path = tmp_path / f"{point}.ckpt"
        first = make(name, 0)
        kill_at(first, point)
        with pytest.raises(Killed):
            first.run(DATA, progress_bar=False, num_steps=NUM_STEPS, checkpoint=path)
        resumed = make(name, 99)  # other initial values, other draws
        history = resumed.run(DATA, progress_bar=False, num_steps=NUM_STEPS, checkpoint=path)
        assert history.losses == losses, point
        assert history.inverse_temperatures == whole.history.inverse_temperatures
        assert [s.log_factor_sd for s in history.stages] == [s.log_factor_sd for s in whole.history.stages]
        for key, value in parameters(resumed).items():
            assert torch.equal(value, values[key]), (point, key)


def test_run_writes_as_often_as_asked_and_resumes_from_the_last(tmp_path):
    path = tmp_path / "fit.ckpt"
    whole = make("planar", 0).run(DATA, progress_bar=False).losses
    svi = make("planar", 0)
    kill_at(svi, 11)
    save, svi._state = svi._state, None
    seen = []
    svi._state = lambda: (seen.append(svi.history.num_steps), save())[1]
    with pytest.raises(Killed):
        svi.run(DATA, progress_bar=False, checkpoint=path, checkpoint_every=4)
    # Every four steps, and what there is when an error ends the run.
    assert seen == [4, 8, 11]
    resumed = make("planar", 5)
    assert resumed.run(DATA, progress_bar=False, checkpoint=path).losses == whole
    # The script once more, after the end: nothing is left to do.
    assert make("planar", 6).run(DATA, progress_bar=False, checkpoint=path).losses == whole


def test_run_writes_by_the_clock(tmp_path):
    svi = make("planar", 0)
    seen = []
    save = svi._state
    svi._state = lambda: (seen.append(svi.history.num_steps), save())[1]
    every = timedelta(microseconds=1)
    svi.run(DATA, progress_bar=False, checkpoint=tmp_path / "fit.ckpt", checkpoint_every=every)
    assert seen == list(range(1, svi.history.num_steps + 1))


@pytest.mark.parametrize("every", [0, -1, 0.5, True, timedelta(0)])
def test_checkpoint_every_is_checked(every, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every"):
        make("planar", 0).run(DATA, progress_bar=False, checkpoint=tmp_path / "x", checkpoint_every=every)


def test_with_module_local_params(tmp_path):
    with pyro.settings.context(module_local_params=True):
        whole = make("planar", 0)
        losses = whole.run(DATA, progress_bar=False).losses
        first = make("planar", 0)
        for _ in range(10):
            first.step(DATA)
        first.save_checkpoint(tmp_path / "x")
        resumed = make("planar", 1)
        assert resumed.run(DATA, progress_bar=False, checkpoint=tmp_path / "x").losses == losses


@pytest.mark.filterwarnings("ignore:The model has parameters")  # on the joint path
def test_parameters_and_buffers_of_a_model(tmp_path):
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 4)
            self.norm = torch.nn.BatchNorm1d(4)

        def model(self, data: torch.Tensor) -> None:
            pyro.module("decoder", self)
            offset = pyro.param("offset", torch.tensor(1.0), constraint=dist.constraints.positive)
            z = pyro.sample("z", dist.Normal(torch.zeros(8, 2), 1.0).to_event(2))
            x = self.norm(self.layer(z)).mean() + offset
            pyro.sample("x", dist.Normal(x, 1.0).expand([4]).to_event(1), obs=data)

    def make() -> tuple[AdaAnnSVI, Decoder]:
        pyro.clear_param_store()
        decoder = Decoder()
        guide = AutoNormal(decoder.model)
        schedule = LinearSchedule(3, initial_inverse_temperature=0.5)
        options = {"num_initial_steps": 3, "num_steps_per_stage": 2, "num_final_steps": 5}
        return AdaAnnSVI(decoder.model, guide, adam(), Trace_ELBO(), schedule=schedule, **options), decoder

    svi, decoder = make()
    for _ in range(6):
        svi.step(DATA)
    svi.save_checkpoint(tmp_path / "x")
    losses = svi.run(DATA, progress_bar=False).losses
    resumed, other = make()
    assert resumed.run(DATA, progress_bar=False, checkpoint=tmp_path / "x").losses == losses
    for key, value in decoder.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def written(tmp_path: Path) -> Path:
    svi = make("planar", 0)
    for _ in range(8):
        svi.step(DATA)
    path = tmp_path / "fit.ckpt"
    svi.save_checkpoint(path)
    return path


def python_and_numpy() -> tuple[object, int]:
    return random.getstate(), np.random.get_state()[2]  # noqa: NPY002


def assert_refused(svi: AdaAnnSVI, path: Path, message: str, data: torch.Tensor = DATA) -> None:
    """The error, and that the fit goes on as if nobody had asked."""
    svi.step(data)
    before = torch.get_rng_state(), parameters(svi), svi.history.losses, python_and_numpy()
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        svi.load_checkpoint(path, data)
    assert path.read_bytes() == content
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in parameters(svi).items())
    assert svi.history.losses == before[2]
    assert python_and_numpy() == before[3]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.999])
def test_a_file_that_was_cut_off(share, tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert_refused(make("planar", 1), path, "Expected a (whole )?checkpoint")


def test_any_changed_byte_is_noticed(tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    svi = make("planar", 1)
    for place in random.Random(0).sample(range(len(content)), 50):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="Expected a"):
            svi.load_checkpoint(path, DATA)


def test_foreign_and_newer_files(tmp_path):
    path = written(tmp_path)
    newer = path.read_bytes().replace(b"checkpoint 3\n", b"checkpoint 4\n", 1)
    path.write_bytes(newer)
    assert_refused(make("planar", 1), path, "format 3; got .* of format 4")
    torch.save({"a": 1}, path)
    assert_refused(make("planar", 1), path, "another kind of file")
    with pytest.raises(FileNotFoundError):
        make("planar", 1).load_checkpoint(tmp_path / "nowhere", DATA)


def test_fits_that_do_not_match(tmp_path):
    path = written(tmp_path)
    assert_refused(make("realnvp", 1), path, "guide AutoRealNVP; got one with AutoPlanar")
    assert_refused(make("planar, plateau", 1), path, "with optim SGD.*; got one with Adam")
    svi = make("planar", 1)
    svi._settings["schedule"] = "another"
    assert_refused(svi, path, "with schedule another; got one with AdaAnnSchedule")

    def with_model(model: object, num_transforms: int) -> AdaAnnSVI:
        like = make("planar", 1)
        pyro.clear_param_store()
        guide = AutoPlanar(model, num_transforms)
        svi = AdaAnnSVI(model, guide, adam(), Trace_ELBO(4, vectorize_particles=True))
        svi._settings = {**like._settings}
        return svi

    assert_refused(with_model(plated, 4), path, r"transform\$\$\$parts.0.b' has shape \(3,\), here \(4,\)")

    def renamed(data: torch.Tensor) -> None:
        pyro.sample("zz", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    assert_refused(with_model(renamed, 3), path, r"sites zz \(Normal\); got .*scale \(HalfCauchy\)")


def test_a_file_of_another_fit_is_not_overwritten(tmp_path):
    path = written(tmp_path)
    content = path.read_bytes()
    svi = make("planar", 1)
    svi.step(DATA)
    with pytest.raises(ValueError, match=r"of this fit.*another path"):
        svi.run(DATA, progress_bar=False, checkpoint=path)
    assert path.read_bytes() == content


def test_code_in_a_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, (f"touch {tmp_path}/evil",))

    with pytest.raises(ValueError, match="got a Evil at state"):
        write_checkpoint(tmp_path / "x", {"a": [Evil()]})
    assert not list(tmp_path.iterdir())
    # By hand, past the check, with a correct checksum.
    import hashlib
    import io

    body = io.BytesIO()
    torch.save({"a": Evil()}, body)
    digest = hashlib.sha256(body.getvalue()).hexdigest().encode()
    (tmp_path / "x").write_bytes(b"pyro_adaann checkpoint 3\n" + digest + b"\n" + body.getvalue())
    with pytest.raises(ValueError, match=r"got code in .* not been run"):
        read_checkpoint(tmp_path / "x")
    assert not (tmp_path / "evil").exists()


def disk_full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", ["open", "write", "fsync", "replace"])
def test_a_full_disk_costs_neither_the_run_nor_the_old_file(fault, tmp_path, monkeypatch):
    whole = make("planar", 0).run(DATA, progress_bar=False).losses
    path = tmp_path / "fit.ckpt"
    svi = make("planar", 0)
    for _ in range(8):
        svi.step(DATA)
    svi.save_checkpoint(path)
    content = path.read_bytes()
    if fault in ("fsync", "replace"):
        monkeypatch.setattr(os, fault, disk_full)
    else:
        plain = builtins.open

        def open_(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
            if "w" not in mode:
                return plain(file, mode, *args, **kwargs)
            if fault == "open":
                disk_full()
            result = plain(file, mode, *args, **kwargs)
            result.write(b"pyro_adaann chec")  # as much as there was room for
            result.flush()
            result.close()
            return disk_full()

        monkeypatch.setattr(builtins, "open", open_)
    with pytest.raises(OSError, match="No space"):
        svi.save_checkpoint(path)
    with pytest.warns(UserWarning, match="could not be written .*No space.*goes on"):
        history = svi.run(DATA, progress_bar=False, checkpoint=path, checkpoint_every=4)
    monkeypatch.undo()
    assert history.losses == whole
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["fit.ckpt"]


SCRIPT = """
import sys
import pyro
import torch
from test_checkpoint import DATA, make
torch.set_num_threads(1)
svi = make(sys.argv[1], int(sys.argv[2]))
plain = svi.step
def step(*args):
    loss = plain(*args)
    print(svi.history.num_steps, flush=True)
    return loss
svi.step = step
svi.run(DATA, progress_bar=False, checkpoint=sys.argv[3], checkpoint_every=1)
print("losses", *(loss.hex() for loss in svi.history.losses))
"""


def start(tmp_path: Path, name: str, seed: int) -> subprocess.Popen:
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder), str(folder.parent)])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, name, str(seed), str(tmp_path / "fit.ckpt")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def kill_and_resume(name: str, tmp_path: Path, delays: list[tuple[int, float]]) -> None:
    whole = make(name, 0).run(DATA, progress_bar=False).losses
    for num_steps, delay in delays:
        process = start(tmp_path, name, 0)
        for line in process.stdout:
            if int(line) == num_steps:
                break
        time.sleep(delay)  # into the write of this step, or the next
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        read_checkpoint(tmp_path / "fit.ckpt")
    process = start(tmp_path, name, 7)
    out, _ = process.communicate()
    assert process.returncode == 0
    losses = [float.fromhex(word) for word in out.splitlines()[-1].split()[1:]]
    assert losses == whole


def test_sigkill(tmp_path):
    kill_and_resume("planar", tmp_path, [(4, 0.0)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planar", "realnvp, lr"])
def test_sigkill_again_and_again_in_the_middle_of_writing(name, tmp_path):
    # Writing takes a few milliseconds; the delays go through them.
    kill_and_resume(name, tmp_path, [(3 + i, 0.0007 * i) for i in range(15)])


def test_killed_in_the_middle_of_a_write(tmp_path, monkeypatch):
    # At every stage of a write the place holds the old file, whole.
    path = tmp_path / "fit.ckpt"
    svi = make("planar", 0)
    for _ in range(5):
        svi.step(DATA)
    svi.save_checkpoint(path)
    content = path.read_bytes()

    def killed(*args: object) -> None:
        raise Killed

    svi.step(DATA)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            with pytest.raises(Killed):
                svi.save_checkpoint(path)
        assert path.read_bytes() == content
        assert (tmp_path / "fit.ckpt.tmp").exists()  # as a killed process leaves it
    resumed = make("planar", 1)
    resumed.run(DATA, progress_bar=False, checkpoint=path)
    assert resumed.history.losses == make("planar", 0).run(DATA, progress_bar=False).losses
    assert not (tmp_path / "fit.ckpt.tmp").exists()


def test_resuming_changes_no_other_fit(tmp_path):
    path = written(tmp_path)
    problem = conjugate_normal()
    other = AdaAnnSVI(problem.model, AutoRealNVP(problem.model, 2, [4]), adam(), Trace_ELBO())
    other.step()
    before = parameters(other)
    with pyro.get_param_store().scope():
        svi = AdaAnnSVI(plated, AutoPlanar(plated, 3), adam(), Trace_ELBO(4, vectorize_particles=True))
        svi._settings = make_settings()
        svi.load_checkpoint(path, DATA)
    assert all(torch.equal(value, before[name]) for name, value in parameters(other).items())
    assert all(map(math.isfinite, svi.history.losses))


def make_settings() -> dict[str, str]:
    with pyro.get_param_store().scope():
        return make("planar", 0)._settings
