"""The fast ways to compute against plain arithmetic, with the real compiler, which takes too long for a notebook."""

import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_cifar.core import InputError
from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.training import RECIPES, BatchLoss, Engine, choose_engine, choose_recipe, fit
from attn_cifar.training import kernels as kernels_module
from attn_cifar.training.fused import fused as with_kernels
from attn_cifar.training.kernels import compile_c, kernels_available

RECIPE = choose_recipe(None, RECIPES["upstream"], {"batch_size": 32})
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
needs_kernels = pytest.mark.skipif(not kernels_available(), reason="the kernels need a C compiler on Linux")


def loss_and_gradient(name: str, precision: str, compile: bool, dtype: torch.dtype = torch.float32, fused: bool = False):
    """Return the loss and all gradients of one batch, from the same start each time, and whether it was compiled."""
    torch.manual_seed(0)
    model = create_model(name).to(memory_format=torch.channels_last).to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("gain", "norm2.weight")):  # they start at 0, and would hide what they scale
            nn.init.ones_(parameter)
    images = torch.randn(32, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    loss_of = BatchLoss(model, RECIPE, Engine("cpu", precision, compile, fused))
    loss = loss_of(images, torch.arange(32) % 10)[0]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item(), gradient.float(), loss_of.compiled is not None


FLOAT32, BFLOAT16 = ("float32", 1e-5, 0.9999, 1e-3), ("bfloat16", 0.02, 0.99, 0.05)


@needs_compiler
@pytest.mark.parametrize(("name", "precision", "loss_off", "cosine", "length"), [
    ("basic_attn", *FLOAT32), pytest.param("basic_attn", *BFLOAT16, marks=pytest.mark.long),
    pytest.param("spatial_attn", *FLOAT32, marks=pytest.mark.long), ("spatial_attn", *BFLOAT16),
    pytest.param("attn_speed", *BFLOAT16, marks=[pytest.mark.long, pytest.mark.skipif(
        torch.__version__ < "2.5", reason="PyTorch 2.4 cannot compile this network in bfloat16, says so, and goes on without")])])
def test_compiled_gradients_are_those_of_float64(name, precision, loss_off, cosine, length):
    """Max-pooling sends a gradient to one of two nearly equal pixels: rounding may choose the other, hence not 1e-6."""
    expected, oracle, _ = loss_and_gradient(name, "float32", compile=False, dtype=torch.float64)
    value, gradient, compiled = loss_and_gradient(name, precision, compile=True)
    assert compiled, "it fell back"
    assert abs(value - expected) < loss_off
    assert F.cosine_similarity(gradient, oracle, 0) > cosine
    assert abs(gradient.norm() / oracle.norm() - 1) < length


@pytest.mark.parametrize(("precision", "fused", "loss_off", "cosine", "length"), [
    ("float32", False, 1e-5, 0.9999, 1e-3), ("bfloat16", False, 0.02, 0.98, 0.05),
    pytest.param("bfloat16", True, 0.02, 0.98, 0.05, marks=needs_kernels)])
def test_attn_tiny_computes_as_float64_does(precision, fused, loss_off, cosine, length):
    """As it is trained: not compiled, the scores of its attention in bfloat16, with kernels."""
    expected, oracle, _ = loss_and_gradient("attn_tiny", "float32", compile=False, dtype=torch.float64)
    value, gradient, _ = loss_and_gradient("attn_tiny", precision, compile=False, fused=fused)
    assert abs(value - expected) < loss_off
    assert F.cosine_similarity(gradient, oracle, 0) > cosine
    assert abs(gradient.norm() / oracle.norm() - 1) < length


@needs_compiler
def test_a_compiled_training_takes_the_same_steps(tmp_path):
    data = load_data("shapes").subset(160, 100)
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        run = fit(create_model("spatial_attn"), data, recipe=RECIPE, epochs=2, max_lr=0.001, device="cpu", precision="float32",
                  compile=compile, verbose=False, out=tmp_path / str(compile))
        assert run.config["engine"]["compile"] is compile
        losses.append(torch.tensor(run.steps["loss"]))
    assert torch.allclose(*losses, atol=1e-3)


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    """A PATH without any program: the first compiled step fails, and the training is the plain one."""
    code = ("import attn_cifar.training as t, attn_cifar.models as m, attn_cifar.data as d, logging; logging.basicConfig(); "
            "r = t.fit(m.create_model('basic_attn'), d.load_data('shapes').subset(96, 50), epochs=2, batch_size=32, "
            "compile=True, verbose=False); print(len(r.steps['loss']))")
    environment = {**os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["6"]
    assert done.stderr.count("training goes on without it") == 1, done.stderr[-2000:]


def test_an_error_of_the_model_is_not_taken_for_a_missing_compiler(caplog):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 32 * 32, 10)

        def forward(self, images):
            if torch.is_grad_enabled():
                raise RuntimeError("the model's own mistake")
            return self.head(images.flatten(1))

    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="own mistake"):
        fit(Broken(), load_data("shapes").subset(64, 50), epochs=1, batch_size=32, compile=True, verbose=False)


# ---- kernels ----
class OddNetwork(nn.Module):
    """What other people's networks contain: odd sizes, few channels, strides, shared and frozen layers, in-place activations."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(20, affine=False),
            nn.Conv2d(20, 24, 3, stride=2), nn.BatchNorm2d(24, momentum=None), nn.GELU(approximate="tanh"), nn.BatchNorm2d(24),
            nn.SiLU(), nn.MaxPool2d(3, 1), nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True))
        self.frozen = nn.BatchNorm2d(8).eval().requires_grad_(False)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        return self.head(self.frozen(self.body(images)).mean((2, 3)))


@needs_kernels
@pytest.mark.parametrize("size", [32, 29])
def test_networks_of_other_people_compute_the_same_with_kernels(size):
    results = []
    for dtype, fast in ((torch.float64, False), (torch.float32, True)):
        torch.manual_seed(0)
        model, images = OddNetwork().to(dtype), torch.randn(6, 3, size, size).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            if fast:
                with with_kernels(model):
                    logits = model(images)
            else:
                logits = model(images)
        F.cross_entropy(logits if dtype == torch.float64 else logits.float(), torch.arange(6)).backward()
        results.append((torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double(),
                        torch.cat([b.flatten().double() for b in model.buffers()])))
    (oracle, statistics), (gradient, found) = results
    assert F.cosine_similarity(gradient, oracle, 0) > 0.98
    assert torch.allclose(found, statistics, rtol=0.02, atol=0.02)


@needs_kernels
def test_the_number_of_threads_does_not_change_what_the_kernels_compute():
    x, threads = torch.randn(6, 24, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last), torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        norm, images = nn.BatchNorm2d(24), x.clone().requires_grad_()
        y = kernels_module.norm_activation(images, norm, F.silu, images)
        kernels_module.max_pool(y).sum().backward()
        results.append([y, images.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@needs_kernels
def test_a_damaged_compiled_file_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_CIFAR_CACHE", str(tmp_path))
    source = "int set_threads(int n) { return n; } int three(void) { return 3; }"
    assert compile_c(source).three() == 3
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(b"half a file")
    assert compile_c(source).three() == 3 and path.stat().st_size > 1000
    shutil.rmtree(tmp_path / "kernels")
    (tmp_path / "kernels").write_text("in the way")  # nothing can be kept
    assert compile_c(source).three() == 3


def test_without_a_compiler_plain_operations_do_the_work(monkeypatch):
    monkeypatch.setattr("attn_cifar.training.engine.kernels_available", lambda: False)
    assert not choose_engine(create_model("attn_tiny"), 0, 32, "cpu", "bfloat16").fused
    with pytest.raises(InputError, match="needs a CPU, bfloat16, and a C compiler"):
        choose_engine(create_model("attn_tiny"), 0, 32, "cpu", "bfloat16", fused=True)
    with pytest.raises(InputError, match="not both"):
        choose_engine(create_model("attn_tiny"), 0, 32, "cpu", "bfloat16", compile=True, fused=True)


@needs_kernels
def test_a_run_continues_as_it_began_or_says_that_it_cannot(tmp_path, monkeypatch, caplog):
    data, options = load_data("shapes").subset(32, 20), {"device": "cpu", "precision": "bfloat16", "verbose": False}
    for fused in (True, False):  # an older run has no such entry
        run = fit(create_model("spatial_attn"), data, epochs=1, fused=fused, out=tmp_path / str(fused), **options)
        assert run.config["engine"]["fused"] is fused
    monkeypatch.setattr("attn_cifar.training.loop.kernels_available", lambda: False)
    for fused in (False, True):
        assert "continues without" not in caplog.text
        with caplog.at_level(logging.WARNING):
            resumed = fit(create_model("spatial_attn"), data, epochs=2, resume=True, out=tmp_path / str(fused), **options)
        assert resumed.config["engine"]["fused"] is fused
    assert "continues without" in caplog.text
