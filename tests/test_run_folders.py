"""Run folders: every file is checked, each belongs to one run, one process at a time trains there, a finished run can go on."""

import csv
import dataclasses
import errno
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from attn_cifar.data import InputError, load_data
from attn_cifar.files import read_tensors, write_tensors
from attn_cifar.models import create_model
from attn_cifar.training import fit, load_run
from attn_cifar.training.runs import FolderLock
from attn_cifar.training.state import TrainingState

NUMBERS = math.nan, math.inf, -1, 10**400, True, "1", None, [], {}
WRONG = NUMBERS + (-0.5, "", "\ud800x", 2**70, [[]], {"a": 1})


@pytest.fixture(scope="module")
def data():
    return load_data("shapes").subset(100, 20)


def train(data, out, **options):
    torch.manual_seed(0)
    options = {"epochs": 2, "batch_size": 50, "device": "cpu", "compile": False, "verbose": False, "recipe": "plain", **options}
    return fit(create_model("hybrid_attn"), data, out=out, **options)


@pytest.fixture(scope="module")
def stored(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data, folder)
    return folder


@pytest.fixture
def run(stored, tmp_path) -> Path:
    return shutil.copytree(stored, tmp_path / "run")


def refusal(call) -> str:
    """Return the one line with which a call is refused."""
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    return str(refused.value)


def leaves(tree, path=()):
    """Yield the path of every entry of nested dictionaries and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


def put(tree, path, value):
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def test_every_entry_of_a_configuration_is_checked(run):
    """Whatever an entry is replaced by, the run loads or is refused in one line; of a wrong type, it is refused."""
    text = (run / "config.json").read_text()
    chance, loaded = random.Random(0), 0
    for path in leaves(json.loads(text)):
        for value in chance.sample(WRONG, 5):
            config = json.loads(text)
            then = config
            for key in path:
                then = then[key]
            put(config, path, value)
            (run / "config.json").write_text(json.dumps(config))
            try:
                load_run(run)
                loaded += 1
                same = isinstance(value, type(then)) or {type(value), type(then)} <= {int, float} or path[:1] == ("notes",)
                assert same or path == ("machine", "gpu") and isinstance(value, str), (path, value)
            except InputError as error:
                assert "\n" not in str(error)
    assert loaded < 60


@pytest.mark.parametrize("name", ["metrics.csv", "timing.csv", "steps.csv"])
@pytest.mark.parametrize("edit", [lambda t: t.replace("0.", "nan,", 1), lambda t: t.split("\n", 1)[1], lambda t: t + "1,2\n",
                                  lambda t: "", lambda t: t.replace(t.splitlines()[1].split(",")[0], "inf"), lambda t: t + "x\n",
                                  lambda t: t.replace(t.splitlines()[1].split(",")[0], "-3"), lambda t: "\0" + t])
def test_every_table_is_checked(run, name, edit):
    path = run / name
    text = path.read_text()
    assert edit(text) != text
    path.write_text(edit(text))
    refusal(lambda: load_run(run))


@pytest.mark.parametrize(("name", "edit"), [
    ("logits", lambda x: x * math.nan), ("logits", lambda x: x[:, :9]), ("logits", lambda x: x.double()),
    ("logits", lambda x: [1.0]),
    ("labels", lambda x: x + 9), ("labels", lambda x: x - 9), ("labels", lambda x: x[:-1]), ("labels", lambda x: x.float()),
    ("class_names", lambda x: x[::-1]), ("class_names", lambda x: list(x)), ("class_names", lambda x: 3), ("more", lambda _: 1)])
def test_every_part_of_an_evaluation_is_checked(run, name, edit):
    tree = read_tensors(run / "evaluation.safetensors")
    write_tensors(run / "evaluation.safetensors", {**tree, name: edit(tree.get(name))})
    refusal(lambda: load_run(run))


@pytest.mark.parametrize("edit", [lambda x: x * math.nan, lambda x: x.double(), lambda x: x[None], lambda x: 1.0,
                                  lambda x: None])
def test_every_weight_is_checked(run, edit):
    tree = read_tensors(run / "model.safetensors")
    name = next(name for name, value in tree.items() if value.ndim > 1)
    write_tensors(run / "model.safetensors", {**tree, name: edit(tree[name])})
    refusal(lambda: load_run(run))
    write_tensors(run / "model.safetensors", [1])
    refusal(lambda: load_run(run))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "timing.csv", "steps.csv", "model.safetensors",
                                  "evaluation.safetensors", "checkpoint/state.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "dangling link", "loop"])
def test_only_regular_files_inside_the_folder_are_read(run, data, stored, name, kind):
    path = run / name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link out": lambda: path.symlink_to(stored / name),
     "dangling link": lambda: path.symlink_to("nothing"), "loop": lambda: path.symlink_to(path.name)}[kind]()
    assert path.name in refusal((lambda: train(data, run, resume=True)) if "checkpoint" in name else (lambda: load_run(run)))


@pytest.mark.parametrize("name", ["checkpoint", "figures", "tensorboard"])
@pytest.mark.parametrize("resume", [False, True])
def test_nothing_is_written_or_deleted_through_a_linked_folder(run, data, tmp_path, name, resume):
    """A planted link to a folder of the user's, in a new run and in one that goes on."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for letter in ("events.out.tfevents.1.figures", "state.safetensors", "history.png"):
        (victim / letter).write_text("untouched")
    if not resume:
        shutil.rmtree(run)
        run.mkdir()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(victim, target_is_directory=True)
    assert name in refusal(lambda: train(data, run, resume=resume, epochs=3)) or name == "checkpoint"
    assert {path.read_text() for path in victim.iterdir()} == {"untouched"} and len(list(victim.iterdir())) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "evaluation.safetensors", "metrics.csv", "lr_find.json", "report.html"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_training(data, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert name in refusal(lambda: train(data, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "nested"])
def test_a_lock_that_is_none_neither_blocks_nor_is_followed(tmp_path, kind):
    path, victim = tmp_path / ".lock", tmp_path / "victim"
    victim.write_text("untouched")
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(victim),
     "nested": lambda: path.write_text("[" * 100_000)}[kind]()
    lock = FolderLock(tmp_path)
    refusal(lock.acquire)
    lock.release()
    assert victim.read_text() == "untouched" and os.path.lexists(path)


def test_measured_numbers_can_be_zero(data, tmp_path):
    """A network that knows the answer: the test loss is exactly 0."""
    one_class = dataclasses.replace(data, test_labels=np.zeros_like(data.test_labels))

    class Certain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3072, 10)

        def forward(self, images):
            return self.net(images.flatten(1)) + (0.0 if self.training else 1e4) * torch.eye(10)[0]

    run = fit(Certain(), one_class, epochs=1, out=tmp_path / "run", device="cpu", verbose=False)
    assert run.history[0]["test_loss"] == 0.0 and load_run(tmp_path / "run", Certain()).evaluation.loss == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_refused_and_not_saved(data, tmp_path, bad):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.evaluations = nn.Linear(3072, 10), 0

        def forward(self, images):
            self.evaluations += not self.training and len(images) == 20
            return self.net(images.flatten(1)) + (bad if self.evaluations == 2 and not self.training else 0.0)

    with pytest.raises(FloatingPointError, match="after epoch 2.*last good checkpoint") as refused:
        fit(Broken(), data, epochs=3, out=tmp_path / "run", device="cpu", verbose=False)
    assert "\n" not in str(refused.value)
    notes = read_tensors(tmp_path / "run" / "checkpoint" / "state.safetensors")["notes"]
    assert len(notes["history"]) == 1 and len(load_run(tmp_path / "run", Broken()).history) == 1


@pytest.mark.parametrize("options", [{"seed": 1}, {"max_lr": 0.02}, {"batch_size": 20}])
def test_a_checkpoint_of_another_run_is_refused(run, data, tmp_path, options):
    train(data, tmp_path / "other", **options)
    shutil.copy(tmp_path / "other" / "checkpoint" / "state.safetensors", run / "checkpoint" / "state.safetensors")
    assert "belongs to another run" in refusal(lambda: train(data, run, resume=True))


@pytest.mark.parametrize("part", ["train_labels", "test_labels", "train_images", "test_images"])
def test_changed_labels_or_pixels_are_refused(run, data, part):
    values = getattr(data, part).copy()
    values.flat[7] = (values.flat[7] + 1) % 10
    changed = dataclasses.replace(data, **{part: values})
    assert part.split("_")[1].replace("images", "pixels") in refusal(lambda: train(changed, run, resume=True))


def test_damaged_notes_of_a_checkpoint_are_refused(run, data):
    path = run / "checkpoint" / "state.safetensors"
    tree = read_tensors(path)
    for notes in ({}, {**tree["notes"], "history": [{}]}, {**tree["notes"], "steps": {"loss": [1.0]}},
                  {**tree["notes"], "identity": 3}, {**tree["notes"], "history": tree["notes"]["history"] * 2},
                  {**tree["notes"], "history": []}):
        write_tensors(path, {**tree, "notes": notes})
        refusal(lambda: train(data, run, resume=True))


def test_another_number_of_threads_is_reported_in_one_line(run, data, caplog):
    config = json.loads((run / "config.json").read_text())
    config["machine"]["threads"] += 1
    (run / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "attn_cifar"):
        train(data, run, resume=True)
    assert len(caplog.messages) == 1 and "thread" in caplog.messages[0]


def test_notes_that_json_cannot_hold_are_refused_before_anything_is_written(data, tmp_path):
    refusal(lambda: train(data, tmp_path / "run", notes={"a": object()}))
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_train_in_one_folder(run, data):
    program = "import sys, pathlib; from attn_cifar.training.runs import FolderLock\n" \
              "FolderLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        assert "another process trains" in refusal(lambda: train(data, run, resume=True))
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    finally:
        other.kill()
        other.communicate()
    assert (run / ".lock").exists(), "it was killed"
    train(data, run, resume=True)
    assert not (run / ".lock").exists()


def test_a_lock_of_another_machine_counts_while_it_is_renewed(tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    lock.path.write_text(json.dumps({**lock.own, "host": "elsewhere"}))
    refusal(FolderLock(tmp_path / "run").acquire)
    os.utime(lock.path, (time.time() - 700,) * 2)
    FolderLock(tmp_path / "run").acquire()
    for content in ("", "[]", "{}", '{"pid": "x", "host": 3}'):  # left by a machine that lost its power
        lock.path.write_text(content)
        os.utime(lock.path, (time.time() - 700,) * 2)
        FolderLock(tmp_path / "run").acquire()


def test_many_contenders_for_a_stale_lock_have_one_winner(tmp_path):
    for _ in range(10):
        (tmp_path / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "started": "1"}))
        start, won = threading.Barrier(8), []

        def contend(start=start, won=won):
            lock = FolderLock(tmp_path)
            start.wait()
            try:
                lock.acquire()
                won.append(lock)
            except InputError:
                pass

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].release()


def test_a_refused_run_leaves_no_lock(run, data):
    refusal(lambda: train(data, run, resume=True, seed=3))
    assert not (run / ".lock").exists()


def test_a_finished_run_continues_with_a_new_schedule(run, data, caplog):
    before = load_run(run)
    with caplog.at_level(logging.WARNING, "attn_cifar"):
        longer = train(data, run, resume=True, epochs=6)
    assert len(caplog.messages) == 1 and "continues to epoch 6" in caplog.messages[0]
    assert longer.history[:2] == before.history and len(longer.history) == 6 and longer.config["continued"] == [2]
    assert longer.steps["loss"][:4] == before.steps["loss"] and len(longer.steps["lr"]) == 12
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.003)
    schedule, expected = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, total_steps=8), []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert longer.steps["lr"][4:] == pytest.approx(expected)
    assert "epochs of its recipe is 6, not 2" in refusal(lambda: train(data, run, resume=True))
    assert train(data, run, resume=True, epochs=6).history == longer.history


def test_a_continued_run_that_stops_resumes_exactly(run, data, tmp_path):
    """Stopped inside the added epochs, also before their first checkpoint, it ends like one that was left alone."""
    whole = train(data, shutil.copytree(run, tmp_path / "whole"), resume=True, epochs=5)
    for stop in (1, 4):
        out = shutil.copytree(run, tmp_path / f"stopped{stop}")
        seen = []

        def interrupt(*_, seen=seen, stop=stop):
            seen.append(1)
            if len(seen) == stop:
                signal.raise_signal(signal.SIGTERM)

        hook = register_optimizer_step_post_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                train(data, out, resume=True, epochs=5)
        finally:
            hook.remove()
        resumed = train(data, out, resume=True, epochs=5)
        assert resumed.steps == whole.steps and torch.equal(resumed.evaluation.logits, whole.evaluation.logits)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_mode_and_signal_handlers_are_restored(data, before, wanted):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    torch.use_deterministic_algorithms(before, warn_only=True)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        train(data, None, epochs=1, deterministic=wanted)
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_ctrl_c_during_a_restore_waits_until_it_is_complete():
    torch.manual_seed(0)
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)

    class Slow:
        def state_dict(self):
            return {}

        def load_state_dict(self, _):
            signal.raise_signal(signal.SIGINT)

    state = TrainingState(model, slow=Slow(), other=other)
    before = [p.clone() for p in (*model.parameters(), *other.parameters())]
    snapshot = state.capture()
    for undo in (lambda: state.restore(snapshot), lambda: state.preserved().__enter__()):
        with pytest.raises(KeyboardInterrupt):
            with state.preserved() if undo.__code__.co_names == ("preserved", "__enter__") else memoryview(b""):
                with torch.no_grad():
                    for p in (*model.parameters(), *other.parameters()):
                        p.add_(1)
                if "restore" in undo.__code__.co_names:
                    undo()
        assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *other.parameters()), strict=True))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_one_error_also_in_tensorboards_thread(data, tmp_path, capfd, monkeypatch):
    from tensorboard.summary.writer.record_writer import RecordWriter

    written, hook = [], threading.excepthook

    def write(self, content, original=RecordWriter.write):
        written.append(content)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, content)

    monkeypatch.setattr(RecordWriter, "write", write)
    with pytest.raises(OSError, match="No space left"):
        train(data, tmp_path / "run")
    assert "Traceback" not in capfd.readouterr().err and threading.excepthook is hook
    monkeypatch.undo()
    train(data, tmp_path / "run", resume=True)


def test_rows_of_a_stored_run_are_those_in_memory(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [{name: row[name] for name in rows[0]} for row in load_run(run).history] == rows
