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

from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.training import RECIPES, BatchLoss, Engine, choose_recipe, fit

RECIPE = choose_recipe(None, RECIPES["upstream"], {"batch_size": 32})
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def loss_and_gradient(name: str, precision: str, compile: bool, dtype: torch.dtype = torch.float32):
    """Return the loss and all gradients of one batch, from the same start each time, and whether it was compiled."""
    torch.manual_seed(0)
    model = create_model(name).to(memory_format=torch.channels_last).to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("gain", "norm2.weight")):  # they start at 0, and would hide what they scale
            nn.init.ones_(parameter)
    images = torch.randn(32, 3, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last)
    loss_of = BatchLoss(model, RECIPE, Engine("cpu", precision, compile))
    loss = loss_of(images, torch.arange(32) % 10)[0]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return loss.item(), gradient.float(), loss_of.compiled is not None


FLOAT32, BFLOAT16 = ("float32", 1e-5, 0.9999, 1e-3), ("bfloat16", 0.02, 0.99, 0.05)


@needs_compiler
@pytest.mark.parametrize(("name", "precision", "loss_off", "cosine", "length"), [
    ("basic_attn", *FLOAT32), pytest.param("basic_attn", *BFLOAT16, marks=pytest.mark.long),
    pytest.param("spatial_attn", *FLOAT32, marks=pytest.mark.long), ("spatial_attn", *BFLOAT16),
    pytest.param("attn_speed", *BFLOAT16, marks=pytest.mark.skipif(
        torch.__version__ < "2.5", reason="PyTorch 2.4 cannot compile this network in bfloat16, says so, and goes on without"))])
def test_compiled_gradients_are_those_of_float64(name, precision, loss_off, cosine, length):
    """Max-pooling sends a gradient to one of two nearly equal pixels: rounding may choose the other, hence not 1e-6."""
    expected, oracle, _ = loss_and_gradient(name, "float32", compile=False, dtype=torch.float64)
    value, gradient, compiled = loss_and_gradient(name, precision, compile=True)
    assert compiled, "it fell back"
    assert abs(value - expected) < loss_off
    assert F.cosine_similarity(gradient, oracle, 0) > cosine
    assert abs(gradient.norm() / oracle.norm() - 1) < length


@pytest.mark.parametrize(("precision", "loss_off", "cosine", "length"), [("float32", 1e-5, 0.9999, 1e-3),
                                                                         ("bfloat16", 0.02, 0.98, 0.05)])
def test_attn_tiny_computes_as_float64_does(precision, loss_off, cosine, length):
    """As it is trained: not compiled, the scores of its attention in bfloat16."""
    expected, oracle, _ = loss_and_gradient("attn_tiny", "float32", compile=False, dtype=torch.float64)
    value, gradient, _ = loss_and_gradient("attn_tiny", precision, compile=False)
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
