"""`fit` and `evaluate` take the networks people have, or refuse them in one line before anything is written."""

import copy
import dataclasses
import logging
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_cifar.data import Batches, InputError, load_data
from attn_cifar.training import choose_recipe, evaluate, fit, load_run
from attn_cifar.training.engine import enter_training_mode
from attn_cifar.training.loop import leaves_out_last_batch

Scores = namedtuple("Scores", ["logits", "aux_logits"])
FORMS = {  # what a network may return beside a tensor
    "tuple": lambda logits, features: (logits, features), "list": lambda logits, features: [logits],
    "dictionary": lambda logits, features: OrderedDict(features=features, logits=logits),
    "only entry": lambda logits, features: {"scores": logits},
    "named tuple": lambda logits, features: Scores(logits, logits.clone()),
    "object": lambda logits, features: SimpleNamespace(loss=None, logits=logits)}


class Wrapped(nn.Module):
    """A linear classifier whose output is in another form, also or only in training mode."""

    def __init__(self, form, always: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.form, self.always = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), form, always

    def forward(self, images):
        logits = self.net(images)
        return self.form(logits, images.flatten(1)[:, :7]) if self.training or self.always else logits


class PooledTo1x1(nn.Module):
    """Batch normalization after global pooling: it cannot train on one image."""

    def __init__(self, squeeze: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head, self.squeeze = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10), squeeze

    def forward(self, images):
        x = F.adaptive_avg_pool2d(self.conv(images).relu(), 1)
        return self.head(x.squeeze() if self.squeeze else self.norm(x).flatten(1))


@pytest.fixture(scope="module")
def data():
    return load_data("shapes").subset(129, 21)


def train(model, data, **options):
    options = {"epochs": 1, "batch_size": 64, "device": "cpu", "precision": None, "compile": False, "verbose": False, **options}
    return fit(model, data, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("always", [True, False])
def test_any_form_of_output_trains_like_a_tensor(data, form, always):
    plain = train(Wrapped(lambda logits, _: logits), data, precision="float32")
    run = train(Wrapped(FORMS[form], always), data, precision="float32")
    assert run.steps == plain.steps and torch.equal(run.evaluation.logits, plain.evaluation.logits)
    assert torch.equal(evaluate(run.model, data).logits, plain.evaluation.logits)


@pytest.mark.parametrize("form", [lambda logits, _: (logits, logits.clone()), lambda logits, _: {"a": logits, "b": logits},
                                  lambda logits, features: (features, logits), lambda logits, _: None,
                                  lambda logits, _: logits[:, :1], lambda logits, _: logits[None], lambda logits, _: "text"])
@pytest.mark.parametrize("always", [True, False])
def test_unclear_outputs_are_refused_before_anything_is_written(data, tmp_path, form, always):
    with pytest.raises(InputError) as refused:
        train(Wrapped(form, always), data, out=tmp_path / "run")
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_a_network_for_another_size_is_refused_in_one_line(data, tmp_path):
    with pytest.raises(InputError, match="does not take 2 images of 32×32 pixels"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(100, 10)), data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_dtype_train(data, dtype, tmp_path):
    run = train(Wrapped(FORMS["tuple"]).to(dtype), data, epochs=2, out=tmp_path / "run")
    expected = train(Wrapped(FORMS["tuple"]), data, epochs=2, precision="float32")
    assert run.config["engine"]["precision"] == "float32" and run.evaluation.logits.dtype == torch.float32
    assert run.steps["loss"] == pytest.approx(expected.steps["loss"], rel=1e-5 if dtype == torch.float64 else 0.05)
    stored = load_run(tmp_path / "run", Wrapped(FORMS["tuple"]).to(dtype))
    assert all(p.dtype == dtype for p in stored.model.parameters())
    with pytest.raises(InputError, match="another dtype"):
        load_run(tmp_path / "run", Wrapped(FORMS["tuple"]))
    with pytest.raises(InputError, match="needs float32 weights"):
        train(Wrapped(FORMS["tuple"]).to(dtype), data, precision="bfloat16")


def test_float16_weights_are_evaluated_and_not_trained(data, tmp_path):
    model = Wrapped(FORMS["tuple"])
    expected = evaluate(model, data).logits
    assert torch.allclose(evaluate(copy.deepcopy(model).half(), data).logits, expected, atol=0.02)
    assert torch.equal(evaluate(model, data, precision="float16").logits, expected), "float32 instead, on a CPU"
    with pytest.raises(InputError, match="float16 weights cannot be trained"):
        train(model.half(), data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image_is_left_out_only_if_it_must_be(data, caplog):
    caplog.set_level(logging.WARNING, "attn_cifar")
    run = train(PooledTo1x1(), data, epochs=2)
    assert len(run.steps["loss"]) == 4 and run.history[0]["train_accuracy"] * 128 == pytest.approx(round(
        run.history[0]["train_accuracy"] * 128)) and "leaves out its last batch" in caplog.text
    caplog.clear()
    assert len(train(Wrapped(FORMS["tuple"]), data).steps["loss"]) == 3, "128 + 1 images: the single one is trained"
    assert len(train(PooledTo1x1(), data.subset(130, 21)).steps["loss"]) == 2, "there are 129 images"
    assert len(train(PooledTo1x1(squeeze=True), data).steps["loss"]) == 2, "squeeze() takes away the batch's dimension"


def test_two_images_in_the_last_batch_are_trained(data):
    assert len(train(PooledTo1x1(), data.subset(66, 21)).steps["loss"]) == 2
    assert not leaves_out_last_batch(PooledTo1x1(), data.subset(66, 21), 64)
    assert leaves_out_last_batch(PooledTo1x1(), data.subset(66, 21), 64, processes=2), "each process gets one image"
    assert leaves_out_last_batch(PooledTo1x1(), data.subset(67, 21), 64, processes=2), "one process gets one image"
    assert not leaves_out_last_batch(PooledTo1x1(), data.subset(68, 21), 64, processes=2)


@pytest.mark.parametrize("size", [{"batch_size": 1}, {"images": 1}])
def test_only_single_images_are_refused(data, tmp_path, size):
    few = data.subset(size.pop("images", 20), 21)
    with pytest.raises(InputError, match="one image at a time"):
        train(PooledTo1x1(), few, out=tmp_path / "run", **size)
    assert not (tmp_path / "run").exists()


def test_squeezed_logits_of_a_last_test_image_are_evaluated(data):
    model = PooledTo1x1(squeeze=True)
    many = dataclasses.replace(data, test_images=data.train_images, test_labels=data.train_labels)
    batches = ((torch.randn(n, 3, 32, 32), torch.zeros(n, dtype=torch.int64)) for n in (4, 1))
    assert evaluate(model, batches).logits.shape == (5, 10) and evaluate(model, many).logits.shape == (129, 10)


class Untraceable(nn.Module):
    """Neither copied nor traced, with a volume inside."""

    def __init__(self):
        super().__init__()
        self.volume, self.head, self.calls = nn.Conv3d(1, 4, 3, stride=4), nn.Linear(4 * 8 * 8, 10), (i for i in range(10**6))

    def forward(self, images):
        next(self.calls)
        if torch.jit.is_tracing():
            raise SystemError("not here")
        return self.head(self.volume(images[:, None]).flatten(1))


def test_the_graph_for_tensorboard_never_stops_a_run(data, tmp_path):
    run = train(Untraceable(), data, out=tmp_path / "run")
    assert len(run.history) == 1 and list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("whole", [True, False])
def test_frozen_parts_stay_as_they_are(data, whole):
    """Also where the whole network comes in evaluation mode, as loaded ones do."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Dropout(), nn.AdaptiveAvgPool2d(4))
    body.requires_grad_(False)
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(128, 10), nn.Dropout())
    (model if whole else body).eval()
    before = copy.deepcopy(body.state_dict())
    train(model, data)
    assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items())
    assert not any(module.training for module in body.modules()) and model[3].training


def test_the_modes_of_a_network_in_training_mode_are_its_own():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout())
    model[1].eval()
    enter_training_mode(model)
    assert [module.training for module in model] == [True, False, True]


def test_images_that_are_not_square_train_and_load(data, tmp_path):
    wide = dataclasses.replace(data, train_images=np.concatenate([data.train_images] * 2, 2),
                               test_images=np.concatenate([data.test_images] * 2, 2))
    run = train(nn.Sequential(nn.Flatten(), nn.Linear(32 * 64 * 3, 10)), wide, out=tmp_path / "run", compile=None)
    assert run.config["data"]["image_size"] == [32, 64]
    assert load_run(tmp_path / "run", run.model).config == run.config


def test_square_images_in_batches_of_any_other_size_are_the_same_bits(data):
    """The steps of `fit` are those of a plain loop, whatever the last batch."""
    for images in (128, 127, 100):
        some, model = data.subset(images, 21), PooledTo1x1()
        recipe = choose_recipe(None, "plain", {"epochs": 1, "batch_size": 64})
        reference, batches = copy.deepcopy(model), Batches.train(some, 64, recipe.augmentation)
        losses = []
        optimizer = torch.optim.AdamW(reference.train().parameters(), recipe.max_lr, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.max_lr, total_steps=2)
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert train(model, some, precision="float32").steps["loss"] == pytest.approx(losses, abs=1e-5)
