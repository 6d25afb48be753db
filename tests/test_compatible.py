"""Run folders and weights written by 0.1.0 load, predict, report and resume."""

import shutil
from pathlib import Path

import pytest
import torch

from attn_cifar.app import load_classifier
from attn_cifar.data import load_data
from attn_cifar.files import read_csv
from attn_cifar.models import create_model, load_pretrained
from attn_cifar.report import make_report
from attn_cifar.training import fit, load_run

# Stopped after its first epoch by SIGTERM; `finished.csv` has the steps of the same run without the stop.
WRITTEN_BY_0_1_0 = Path(__file__).parent / "run-0.1.0"


@pytest.fixture
def old_run(tmp_path) -> Path:
    return shutil.copytree(WRITTEN_BY_0_1_0, tmp_path / "run")


@pytest.fixture(scope="module")
def data():
    return load_data("shapes").subset(200, 60)


def test_a_run_loads_and_predicts(old_run, data, tmp_path):
    run = load_run(old_run)
    assert run.config["machine"]["attn_cifar"] == "0.1.0" and len(run.history) == 1 and len(run.steps["lr"]) == 4
    assert run.evaluation.accuracy == pytest.approx(run.history[0]["test_accuracy"], abs=1e-9)
    from PIL import Image

    Image.fromarray(data.test_images[0]).save(tmp_path / "one.png")
    classifier = load_classifier(old_run)
    probabilities = classifier.predict(classifier.read([tmp_path / "one.png"])[1])
    assert torch.allclose(probabilities[0], run.evaluation.probabilities[0], atol=1e-4)


def test_a_run_gets_its_report(old_run, data):
    page = make_report(old_run, data).read_text(encoding="utf-8")
    assert "hybrid_attn" in page and "8.3" in page


def test_a_run_resumes(old_run, data):
    """The losses are those of the same run without the stop; another processor may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        run = fit(create_model("hybrid_attn"), data, recipe="plain", epochs=2, batch_size=50, max_lr=0.01, out=old_run,
                  resume=True, device="cpu", precision="float32", compile=False, verbose=False)
    finally:
        torch.set_num_threads(threads)
    rows = read_csv(WRITTEN_BY_0_1_0 / "finished.csv")
    for name, tolerance in (("lr", 1e-9), ("momentum", 1e-9), ("loss", 2e-3)):
        assert run.steps[name] == pytest.approx([float(row[name]) for row in rows], abs=tolerance)


def test_shipped_weights_load():
    model = load_pretrained("attn_tiny")
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
