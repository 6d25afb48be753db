"""What a GPU waits for, refuses and needs, on a simulated one: see `simulated_gpu.py`."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from simulated_gpu import simulated_gpu

from attn_cifar.cli import main
from attn_cifar.data import Augmentation, Batches, load_data
from attn_cifar.models import create_model
from attn_cifar.studies import speed
from attn_cifar.studies.gpu import PARTS
from attn_cifar.training import BatchLoss, Engine, Muon, choose_recipe
from attn_cifar.training.loop import Checkpoints, Trainer
from attn_cifar.training.runs import Run

T4, A100 = (7, 5), (8, 0)
ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [*sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")), ROOT / "nbs" / "quickstart.ipynb"]


@pytest.fixture(scope="module")
def data():
    return load_data("shapes").subset(160, 100)


def waits_of(function, capability=A100) -> Counter:
    """Count what a function waits for."""
    with simulated_gpu(capability) as gpu:
        function(gpu)
        return gpu.synchronizations


@pytest.mark.parametrize("name", ["tiny", "upstream"])
@pytest.mark.parametrize(("capability", "precision"), [(T4, "float16"), (A100, "bfloat16")])
def test_no_step_waits_for_the_device(data, name, capability, precision):
    recipe = choose_recipe(None, name, {"batch_size": 32, "epochs": 2})

    def steps(gpu):
        torch.manual_seed(0)
        trainer = Trainer(create_model("attn_tiny"), data, recipe, Engine("cuda", precision, False))
        assert trainer.scaler.is_enabled() == (precision == "float16") and gpu.synchronizations
        gpu.synchronizations.clear()
        assert len(list(trainer.epoch())) == 5

    assert waits_of(steps, capability) == {}


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(flip_prob=0.5), Augmentation(alternate=True)])
def test_batches_do_not_wait_for_the_device(data, augmentation, monkeypatch):
    def epoch(gpu):
        inside = Batches.train(data, 32, augmentation, device="cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (data.train_images.nbytes, 0))
        outside = Batches.train(data, 32, augmentation, device="cuda")
        assert inside.images.is_cuda and not outside.images.is_cuda
        gpu.synchronizations.clear()
        for batches in (inside, outside):
            assert all(images.is_cuda and labels.is_cuda for images, labels in batches)

    assert waits_of(epoch) == {}


def test_the_counter_sees_what_waits():
    def wait(gpu):
        there, index = torch.zeros(4, device="cuda"), torch.tensor([1])
        for number, blocking in enumerate((
                lambda: there.sum().item(), there.cpu, there.nonzero, lambda: torch.tensor([1.0], device="cuda"),
                lambda: torch.zeros(4).cuda(), lambda: torch.zeros(4).to("cuda", non_blocking=True), lambda: there[index],
                lambda: there[there > 0], there.tolist, lambda: there.copy_(torch.zeros(4))), start=1):
            blocking()
            assert gpu.synchronizations.total() >= number, f"blocking operation {number} went unnoticed"
            gpu.synchronizations = Counter({"seen": number})
        torch.zeros(4).pin_memory().to("cuda", non_blocking=True)
        torch.full((), 1.0, device="cuda")
        there[torch.tensor([1]).pin_memory().to("cuda", non_blocking=True)]
        assert gpu.synchronizations == {"seen": number}

    waits_of(wait)


def test_blocks_are_counted_in_bytes():
    """8,192 images of 224×224 in float32 would be 4.6 GiB, and several copies of them are alive while they are augmented."""
    def cut(gpu):
        for size, batch_size in ((32, 128), (224, 16), (224, 512)):
            images = np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (4096, size, size, 3))
            batches = Batches(images[:1], np.zeros(1, np.int64), batch_size, mean=(0.5,) * 3, std=(0.2,) * 3, device="cuda")
            batches.labels = torch.zeros(4096, dtype=torch.int64)
            blocks = [sum(map(len, block)) for block in batches._blocks(torch.arange(4096))]
            assert sum(blocks) == 4096
            assert max(blocks) * size * size * 3 <= max(8192 * 3072, batch_size * size * size * 3)
            assert max(blocks) % batch_size == 0 and (size > 32 or blocks == [4096])

    waits_of(cut)


def test_memory_is_asked_of_a_device_with_an_index(data):
    """PyTorch 2.4 refuses `mem_get_info` of a device without one; so does the simulation."""
    def ask(gpu):
        with pytest.raises(ValueError, match="index"):
            torch.cuda.mem_get_info(torch.device("cuda"))
        assert Batches.train(data, 32, Augmentation(), device="cuda").images.is_cuda
        assert Batches.train(data, 32, Augmentation(), device="cuda:0").images.is_cuda

    waits_of(ask)


@pytest.mark.parametrize("name", ["basic_attn", "spatial_attn", "hybrid_attn", "attn_tiny", "attn_speed"])
def test_every_network_trains_with_deterministic_algorithms(name, data, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    def step(gpu):
        recipe = choose_recipe(None, "speed", {"batch_size": 8})
        torch.use_deterministic_algorithms(True)
        try:
            trainer = Trainer(create_model(name), data, recipe, Engine("cuda", "float32", False))
            next(trainer.epoch())
        finally:
            torch.use_deterministic_algorithms(False)

    waits_of(step)


@pytest.mark.long
def test_compiled_bfloat16_gradients_of_the_maximum_are_finite():
    """The gradient of `amax` is NaN there."""
    torch.manual_seed(0)
    model = create_model("attn_speed")
    loss_of = BatchLoss(model, choose_recipe(None, "speed", {"batch_size": 8}), Engine("cpu", "bfloat16", True))
    loss_of(torch.randn(8, 3, 32, 32), torch.arange(8))[0].backward()
    assert loss_of.compiled is not None
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class Graphs:
    """What CUDA graphs demand of a compiled step: its gradients are given up before the next one."""

    def __init__(self, function):
        self.function, self.gradients = function, []

    def __call__(self, images, labels):
        model = self.function.__self__.model
        if any(p.grad is not None for p in model.parameters()):
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten by a subsequent run")
        return self.function(images, labels)


def test_the_speed_study_gives_gradients_up(data, monkeypatch):
    def measure(gpu):
        with monkeypatch.context() as patched:  # undone before the simulation restores PyTorch's own
            patched.setattr(torch, "compile", lambda function, **_: Graphs(function))
            rates = speed.measure_compilation(data, batch_size=8, repeats=1)
        assert len(rates) == 6 and all(rate > 0 for rate in rates.values())

    waits_of(measure)


def test_the_speed_study_sets_the_workspace_before_the_first_product(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    done = speed._run(["-c", "import os; print(os.environ.get('CUBLAS_WORKSPACE_CONFIG'))"], str(tmp_path), tmp_path)
    assert done.stdout.strip() == ":4096:8"


def test_determinism_is_measured_after_other_products(data, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as in the study's processes
    names = "basic_attn_free", "basic_attn_deterministic"
    monkeypatch.setattr(speed, "take_turns", lambda jobs, _: {name: [jobs[name]()] for name in names})

    def measure(gpu):
        torch.zeros(2, 2, device="cuda") @ torch.zeros(2, 2, device="cuda")
        assert len(speed.measure_deterministic(data, batch_size=32, repeats=1)) == 2

    waits_of(measure)


def test_muon_skips_an_overflow_as_adamw_does():
    def overflow(gpu):
        for kind in (Muon, torch.optim.AdamW):
            weights = [torch.nn.Parameter(torch.ones(4, 3, device="cuda")), torch.nn.Parameter(torch.ones(4, device="cuda"))]
            optimizer, scaler = kind(weights, lr=0.1, fused=True), torch.amp.GradScaler("cuda")
            for factor in (1.0, float("inf"), 1.0):
                before = [weight.detach().clone() for weight in weights]
                optimizer.zero_grad()
                scaler.scale(sum((weight * factor).sum() for weight in weights)).backward()
                gpu.synchronizations.clear()
                scaler.step(optimizer)
                scaler.update()
                assert gpu.synchronizations == {}
                moved = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
                assert all(weight.isfinite().all() for weight in weights) and moved == [factor == 1.0] * 2

    waits_of(overflow, T4)


def test_nothing_compiled_needs_no_compiler(data, monkeypatch):
    """`cudagraph_mark_step_begin` imports Inductor, which takes seconds."""
    def train(gpu):
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: pytest.fail("Inductor was imported"))
        recipe = choose_recipe(None, "plain", {"batch_size": 64, "epochs": 1})
        list(Trainer(create_model("spatial_attn"), data, recipe, Engine("cuda", "float32", False)).epoch())

    waits_of(train)


def test_a_checkpoint_keeps_the_scale_of_float16(data, tmp_path):
    """And restores every state to the GPU."""
    def resume(gpu):
        recipe = choose_recipe(None, "tiny", {"batch_size": 32, "epochs": 1})
        config = {"model": "spatial_attn", "parameters": 25_680, "seed": 0, "deterministic": False, "data": {},
                  "recipe": asdict(recipe)}
        run = Run(tmp_path, config, [], {"lr": [], "momentum": [], "loss": []}, None)
        first, second = (Trainer(create_model("spatial_attn"), data, recipe, Engine("cuda", "float16", False)) for _ in range(2))
        steps = first.epoch()
        next(steps)
        first.scaler.update(1024.0)
        (tmp_path / "checkpoint").mkdir(exist_ok=True)
        Checkpoints(run, first).save()
        Checkpoints(run, second).restore()
        assert second.scaler.get_scale() == 1024.0
        assert second.totals.losses.is_cuda and second.totals.correct.is_cuda
        assert all(p.is_cuda and second.optimizer.state[p]["exp_avg"].is_cuda for p in second.model.parameters())
        assert len(list(second.epoch())) == 4

    waits_of(resume, T4)


@pytest.mark.parametrize(("path", "capability"), [
    pytest.param(path, capability, id=f"{path.stem}-{capability}",
                 marks=() if (path.stem, capability) == ("02_models", "7.5") else pytest.mark.long)
    for path in CHAPTERS for capability in ("7.5", "8.0")])
def test_a_chapter_runs_on_a_gpu(path, capability):
    """In float16 on a T4, in bfloat16 on an A100; its assertions hold there, too."""
    words = [sys.executable, str(ROOT / "tests" / "simulated_notebook.py"), capability, str(path)]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("capability", [None, T4, A100])
def test_the_gpu_study_can_be_rehearsed(tmp_path, monkeypatch, capability):
    """Every part succeeds, on a CPU and on the simulated GPU."""
    monkeypatch.chdir(tmp_path)
    words = ["study", "gpu", "--data", "shapes", "--minutes", "6", "--rehearse"]
    if capability is None:
        assert main(words) == 0
    else:
        waits_of(lambda gpu: main(words), capability)
    stored = json.loads((tmp_path / "runs" / "gpu_rehearsal" / "gpu.json").read_text())
    assert [row["part"] for row in stored["parts"]] == [part.name for part in PARTS]
    assert not [row for row in stored["parts"] if "error" in row]
