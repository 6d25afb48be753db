"""The GPU's paths: on a real GPU if there is one, otherwise on a simulated one (`simulated_gpu.py`)."""

import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from simulated_gpu import simulated_gpu

from attn_cifar.cli import main
from attn_cifar.data import Augmentation, Batches, load_data, normalize
from attn_cifar.explain import check_explanations, explain
from attn_cifar.lr_finder import find_lr
from attn_cifar.models import create_model, load_pretrained
from attn_cifar.predict import explain_images, load_classifier
from attn_cifar.report import make_report
from attn_cifar.studies.ladder import evaluate_flipped, picture_attention
from attn_cifar.training import RECIPES, BatchLoss, Engine, choose_engine, choose_recipe, evaluate, fit, load_run
from attn_cifar.training.loop import Trainer

REAL = torch.cuda.is_available()
RECIPE = choose_recipe(None, RECIPES["upstream"], {"batch_size": 32, "epochs": 2, "max_lr": 0.001})


@pytest.fixture(autouse=True)
def gpu():
    """Give each test a GPU; the value is the simulation, or None on a real one."""
    if REAL:
        yield None
    else:
        with simulated_gpu() as simulation:
            yield simulation


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Compare without TF32, which rounds the factors of a convolution to 10 bits on an A100, L4 or H200."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def data():
    return load_data("shapes").subset(160, 100)


def train(data, **options):
    torch.manual_seed(0)
    return fit(create_model("spatial_attn"), data, recipe=RECIPE, verbose=False, **options)


def test_batches_are_those_of_the_cpu(data):
    pair = (Batches.train(data, 32, Augmentation(flip_prob=0.5), device=device) for device in ("cpu", "cuda"))
    for here, there in zip(*pair, strict=True):
        assert there[0].is_cuda and torch.equal(here[1], there[1].cpu())
        assert (here[0] - there[0].cpu()).abs().max() < 0.03, "more than one grey level"


def test_images_that_do_not_fit_stay_outside(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (data.train_images.nbytes, 0))
    outside = Batches.train(data, 32, Augmentation(), device="cuda")
    monkeypatch.undo()
    inside = Batches.train(data, 32, Augmentation(), device="cuda")
    assert not outside.images.is_cuda and inside.images.is_cuda
    for a, b in zip(outside, inside, strict=True):
        assert a[0].is_cuda and torch.allclose(a[0], b[0], atol=1e-5) and torch.equal(a[1], b[1])


def test_training_takes_the_steps_of_the_cpu(data):
    here, there = (train(data, device=d, precision="float32", compile=False) for d in ("cpu", "cuda"))
    assert torch.allclose(torch.tensor(here.steps["loss"]), torch.tensor(there.steps["loss"]), atol=0.01)


def test_training_with_tf32_stays_close(data):
    losses = []
    for allow in (False, True):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=allow):
            losses.append(torch.tensor(train(data, precision="float32", compile=False).steps["loss"]))
    assert torch.allclose(*losses, atol=0.05) and (REAL or not torch.equal(*losses)), "the simulation rounds as TF32 does"


@pytest.mark.parametrize(("precision", "cosine"), [("float32", 0.999), ("bfloat16", 0.99)])
def test_compiled_gradients_are_those_of_plain_float32(precision, cosine):
    gradients = []
    for engine in (Engine("cuda", "float32", False), Engine("cuda", precision, True)):
        torch.manual_seed(0)
        model = create_model("spatial_attn").cuda().to(memory_format=torch.channels_last)
        images = torch.randn(32, 3, 32, 32).cuda().contiguous(memory_format=torch.channels_last)
        loss_of = BatchLoss(model, RECIPE, engine)
        loss_of(images, torch.arange(32, device="cuda") % 10)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*gradients, 0) > cosine


def test_the_default_engine_trains_and_resumes(data, tmp_path):
    assert choose_engine(create_model("spatial_attn"), 10, 32).device == "cuda"
    whole = train(data, out=tmp_path / "whole")
    again = train(data, out=tmp_path / "whole", resume=True)
    assert again.history == whole.history and whole.history[-1]["train_loss"] < whole.history[0]["train_loss"]


def test_muon_and_similarity_attention_run_there(data):
    run = fit(create_model("attn_tiny"), data, recipe="tiny", batch_size=32, epochs=2, verbose=False)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] and run.config["engine"]["device"] == "cuda"
    assert len(picture_attention(run.model, data, [0, 1])["maps"]) == 2
    assert evaluate_flipped(run.model, data).logits.shape == (100, 10)


def test_float16_scales_its_gradients(data):
    assert train(data, precision="float16").history[-1]["train_loss"] < 2.4


def test_the_range_test_leaves_the_gpu_as_it_was(data):
    torch.manual_seed(0)
    model = create_model("spatial_attn").cuda()
    before, random = [p.clone() for p in model.parameters()], torch.cuda.get_rng_state()
    find_lr(model, data, recipe=RECIPE, num_steps=20)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(random, torch.cuda.get_rng_state())


@pytest.mark.parametrize("model_device", ["cpu", "cuda"])
def test_class_weights_of_a_loss_follow_the_model(data, model_device):
    """And stay where they were, afterwards."""
    model, weights = create_model("spatial_attn").to(model_device), torch.arange(1.0, 11.0)
    criterion = torch.nn.CrossEntropyLoss(weights)
    result = find_lr(model, data, None, criterion, recipe=RECIPE, num_steps=10, trials=0)
    assert len(result.losses) > 5
    assert criterion.weight is weights and not weights.is_cuda and torch.equal(weights, torch.arange(1.0, 11.0))
    assert next(model.parameters()).device.type == model_device


def test_a_loaded_run_and_a_classifier_compute_on_the_gpu(data, tmp_path, monkeypatch, capsys):
    """Evaluation, explanations and report of a stored run; without a GPU the same run computes on the CPU, never in float16."""
    run, seen = train(data, out=tmp_path / "run", precision="float16"), []
    monkeypatch.setattr("attn_cifar.cli._run_data", lambda arguments, config: data)
    watched = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.extend((x.device.type, torch.is_autocast_enabled("cpu")) for x in inputs
                                           if isinstance(x, torch.Tensor)))
    try:
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        make_report(tmp_path / "run", data)
        for name in (tmp_path / "run", "attn_tiny"):
            classifier = load_classifier(name)
            images = normalize(torch.as_tensor(data.test_images[:4]), classifier.mean, classifier.std)
            assert not classifier.predict(images).is_cuda
            explanations, judged = explain_images(classifier, images)
            assert len(explanations) == len(judged) and not explanations[0].maps.is_cuda
        assert {device for device, _ in seen} == {"cuda"}
        seen.clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["evaluate", str(tmp_path / "run")]) == 0
        assert set(seen) == {("cpu", False)}
    finally:
        watched.remove()
    first, second = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy")]
    assert abs(float(first.split()[2][:-2]) - float(second.split()[2][:-2])) <= 1
    assert load_run(tmp_path / "run").history == run.history


def test_explanations_are_those_of_the_cpu(data):
    images = normalize(torch.as_tensor(data.test_images[:8]), data.mean, data.std)
    here, there = load_pretrained("attn_tiny"), load_pretrained("attn_tiny").cuda()
    explained = explain(here, images), explain(there, images.cuda(), explain(here, images)[0].targets)
    for one, other in zip(*explained, strict=True):
        assert not other.maps.is_cuda and torch.allclose(one.maps, other.maps, rtol=0, atol=1e-3 * float(one.maps.max()))
    judged = check_explanations(there, images.cuda(), explained[1], steps=4)
    assert all(0 <= one.deletion <= 1 and one.error > 0 for one in judged)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_run_that_began_on_a_gpu_loads_and_resumes_without_one(data, tmp_path, monkeypatch, caplog, precision):
    run = train(data, out=tmp_path / "run", precision=precision)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "attn_cifar"):
        warnings.simplefilter("error")
        assert load_run(tmp_path / "run").history == run.history
        warnings.simplefilter("default")
        again = fit(create_model("spatial_attn"), data, recipe=replace(RECIPE, epochs=3), out=tmp_path / "run", resume=True,
                    verbose=False)
    assert again.history[:2] == run.history and len(again.history) == 3
    assert sum("continues on cpu" in line for line in caplog.messages) == 1
    assert next(again.model.parameters()).device.type == "cpu"


def test_a_device_that_the_caller_names_is_used(data, tmp_path, caplog):
    train(data, out=tmp_path / "run", device="cuda")
    with caplog.at_level(logging.WARNING, "attn_cifar"):
        run = train(data, out=tmp_path / "run", device="cpu", resume=True)
    assert next(run.model.parameters()).device.type == "cpu" and "continues on cpu" in caplog.text


@pytest.mark.parametrize("value", [None, ":16:8"])
def test_the_buffers_of_cublas_are_fixed_on_import(value):
    environment = {name: text for name, text in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": value} if value else {}
    program = "import os, attn_cifar; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (value or ":4096:8")


@pytest.mark.parametrize("name", ["basic_attn", "hybrid_attn", "spatial_attn", "attn_tiny"])
def test_deterministic_runs_use_no_other_kernels(data, name):
    torch.manual_seed(0)
    run = fit(create_model(name), data.subset(32, 16), recipe="plain", batch_size=16, epochs=1, deterministic=True, verbose=False)
    assert len(run.steps["loss"]) == 2


@pytest.mark.parametrize("compiled", [True, False])
def test_steps_of_cuda_graphs_are_marked_only_if_there_are_any(data, monkeypatch, compiled):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    train(data, compile=compiled)
    assert len(marks) == 10 * compiled


@pytest.mark.skipif(REAL, reason="only the simulation counts synchronizations")
@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "bfloat16"), ("sgd", "float16"), ("adam", "float32"),
                                                        ("adam", "float16"), ("muon", "bfloat16")])
def test_a_step_does_not_wait_for_the_device(data, gpu, optimizer, precision):
    recipe = choose_recipe(None, RECIPES["upstream"], {"batch_size": 16, "epochs": 1, "optimizer": optimizer})
    trainer = Trainer(create_model("spatial_attn"), data, recipe, Engine("cuda", precision, False))
    before = None
    for number, _ in enumerate(trainer.epoch()):
        if number == 1:  # the first step has created the optimizer's state
            before = Counter(gpu.synchronizations)
    assert gpu.synchronizations - before == Counter(), "in eight steps"


def test_evaluation_uses_the_device_of_the_model(data):
    here = create_model("spatial_attn")
    there = create_model("spatial_attn").cuda()
    there.load_state_dict(here.state_dict())
    expected = evaluate(here, data).logits
    assert not evaluate(there, data).logits.is_cuda and torch.allclose(evaluate(there, data).logits, expected, atol=0.05)
