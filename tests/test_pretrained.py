"""The weights that come with the package: that they are the ones the study measured, and that they can be used."""

import base64
import csv
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from attn_cifar.cli import main
from attn_cifar.core import InputError
from attn_cifar.data import normalize
from attn_cifar.models import MODELS, count_parameters, create_model, find_pretrained, load_pretrained
from attn_cifar.training import RECIPES
from attn_cifar.studies import load_results
from attn_cifar.training import read_config

STUDY = load_results("ladder")
SHIPPED = [name for name in MODELS if find_pretrained(name)]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Real CIFAR-10 images, the first four classes in their order, that were held out of the ladder's trainings."""
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in STUDY["pictures"]["images"]]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_run_is_what_the_study_measured(name):
    config = read_config(find_pretrained(name))
    with open(find_pretrained(name) / "metrics.csv", newline="") as file:
        history = list(csv.DictReader(file))
    row = next(row for row in STUDY["final"] if (row["name"], row["seed"]) == (name, config["seed"]))
    assert config["recipe"] == json.loads(json.dumps(asdict(RECIPES[MODELS[name].recipe])))
    assert (config["parameters"], config["data"]["train"]) == (count_parameters(create_model(name)), 50_000)
    assert (float(history[-1]["test_accuracy"]), len(history)) == (row["accuracy"], row["epochs"])
    card = (find_pretrained(name) / "README.md").read_text(encoding="utf-8")
    seeds = {key: np.array([row[key] for row in STUDY["final"] if row["name"] == name]) for key in ("accuracy", "flip_averaged")}
    figures = (f"{row['parameters']:,}", f"{row['accuracy']:.2%}", f"{seeds['flip_averaged'].mean():.2%}",
               f"{seeds['accuracy'].mean():.2%} ± {100 * seeds['accuracy'].std(ddof=1):.2f}")
    assert [figure for figure in figures if figure not in card] == [], "the model card gives its figures"


def test_predicts_real_images(pictures, tmp_path, capsys):
    model = load_pretrained("attn_tiny")
    assert not any(module.training for module in model.modules())
    data = read_config(find_pretrained("attn_tiny"))["data"]
    with torch.no_grad():
        logits = model(normalize(torch.as_tensor(np.stack(pictures)), data["mean"], data["std"]))
    right = (logits.argmax(1) == torch.arange(len(pictures))).sum()
    assert right >= len(pictures) - 1, "it was trained on these images, and knows 85 % of others"

    files = [str(tmp_path / f"{place}.png") for place in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        picture.save(file)
    assert main(["predict", "attn_tiny", *files, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    for answer, logit in zip(answers, logits, strict=True):
        best = data["class_names"][logit.argmax()]
        assert next(iter(answer["predictions"])) == best
        assert answer["predictions"][best] == pytest.approx(logit.softmax(0).max().item(), abs=1e-4)


def test_weights_are_loaded_afresh_each_time():
    one, other = load_pretrained("attn_tiny"), load_pretrained("attn_tiny")
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).abs().sum() > 0


def test_a_run_folder_of_that_name_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "attn_huge", "image.png"]) == 2
    assert "attn_huge is neither a run folder nor a model that comes with weights" in capsys.readouterr().err
    (tmp_path / "attn_tiny").mkdir()
    (tmp_path / "attn_tiny" / "config.json").write_text("{}")
    assert main(["predict", "attn_tiny", "image.png"]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["basic_attn", "resnet", "../attn_tiny", ""])
def test_what_is_not_shipped_is_refused(name):
    assert find_pretrained(name) is None
    with pytest.raises(InputError, match="does not come with weights; there is attn_tiny"):
        load_pretrained(name)
