"""Several processes are one training: the same losses, one writer, one end. They are started by torchrun, on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
from PIL import Image

from attn_cifar.cli import main
from attn_cifar.data import load_data
from attn_cifar.files import read_tensors

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(Path(__file__).with_name("process_runs.py"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun itself sets it where it starts several processes
COMPARED = ("model.safetensors", "evaluation.safetensors", "metrics.csv", "steps.csv")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")


def torchrun(count: int, *words: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """Start a program of `process_runs.py` in several processes; a hang ends as a failure."""
    options = ["--standalone", "--nproc-per-node", str(count), "--max-restarts", str(restarts)]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *options, PROGRAM, *words], capture_output=True,
                          text=True, timeout=240, env=ONE_THREAD)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    """Return a folder of 400 images of two shapes."""
    folder = tmp_path_factory.mktemp("images")
    data = load_data("shapes")
    for label in (1, 8):
        (folder / data.class_names[label]).mkdir()
        for i in np.flatnonzero(data.train_labels == label)[:200]:
            Image.fromarray(np.array(data.train_images[i])).save(folder / data.class_names[label] / f"{i}.png")
    return str(folder)


def train(images: str, out: Path, *more: str) -> list[str]:
    network = ["--model", "spatial_attn", "--max-lr", "0.003", "--epochs", "4", "--batch-size", "16", "--device", "cpu"]
    return ["train", "--data", images, *network, "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """Return the folder of a run of two processes that was left alone."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = torchrun(2, "command", "none", "-", *train(images, out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch   4/4") == 1 and done.stdout.count("report:") == 1, "one of them speaks"
    return out


def differences(run: Path, whole: Path) -> list[str]:
    return [name for name in COMPARED if (run / name).read_bytes() != (whole / name).read_bytes()]


def test_losses_are_those_of_one_process(tmp_path):
    runs = {}
    for count in (1, 3):
        done = torchrun(count, "losses", str(tmp_path / f"{count}.json"))
        assert done.returncode == 0, done.stderr[-3000:]
        runs[count] = json.loads((tmp_path / f"{count}.json").read_text())
    alone = np.array(runs[1]["losses"])
    assert len(alone) == 8 * 4 and alone[-1] < alone[0] - 0.1, "it learns, so that a difference would grow"
    np.testing.assert_allclose(runs[3]["losses"], alone, rtol=1e-4)
    for row, expected in zip(runs[3]["history"], runs[1]["history"], strict=True):
        assert row["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=0.021)  # two of 100 images
        assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-3)


def test_gradients_are_those_of_pytorchs_wrapper(tmp_path):
    done = torchrun(2, "gradients", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["difference"] < 1e-5 < 1e-2 < found["without adding"]


def test_a_dead_process_ends_the_run_and_a_restart_completes_it(images, whole, tmp_path):
    """One of two is killed in the second epoch: the other one stops, and torchrun starts both again, after the first epoch."""
    out, marker = tmp_path / "run", str(tmp_path / "died")
    done = torchrun(2, "silent", "SIGKILL@1", marker, *train(images, out, "--resume"), restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(f"{marker}.1").exists() and differences(out, whole) == []
    lines = [line for line in done.stderr.splitlines() if line.startswith("attn-cifar:") and "note:" not in line]
    assert len(lines) == 1 and "another process of this training has ended" in lines[0] and "last good checkpoint" in lines[0]
    assert done.stdout.count("epoch   1/4") == 1 and done.stdout.count("epoch   4/4") == 1, "the first epoch is kept"


@pytest.mark.parametrize("ranks", ["1", *(pytest.param(ranks, marks=pytest.mark.long) for ranks in ("0", "01"))])
def test_a_signal_stops_all_at_the_same_step_and_saves_first(images, whole, tmp_path, ranks):
    out = tmp_path / "run"
    done = torchrun(2, "silent", f"SIGTERM@{ranks}", str(tmp_path / "stopped"), *train(images, out))
    assert done.returncode != 0 and "train with --resume" in done.stderr
    stored = read_tensors(out / "checkpoint" / "state.safetensors")
    steps = len(stored["notes"]["steps"]["loss"]) + len(stored["state"]["totals"]["sizes"])
    assert steps % 21 != 0, "stopped inside an epoch"
    done = torchrun(2, "silent", "none", "-", *train(images, out, "--resume"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert differences(out, whole) == []


@pytest.mark.long
def test_two_machines_are_the_same_training(images, whole, tmp_path):
    """Two agents that meet through torchrun's rendezvous, with a process each, as on two machines."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    words = [sys.executable, "-m", "torch.distributed.run", *options, PROGRAM, "silent", "none", "-"]
    words += train(images, tmp_path / "run")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(words, env=ONE_THREAD, **pipes) for _ in range(2)]
    errors = [agent.communicate(timeout=240)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert differences(tmp_path / "run", whole) == []


def test_another_number_of_processes_is_refused(images, whole, capsys):
    assert main(train(images, whole, "--resume")) == 2
    assert "its processes is 2, not 1" in capsys.readouterr().err


@pytest.mark.long
def test_what_several_processes_cost_and_change(tmp_path):
    """Measure, for the notebook on processes: messages, and what batch normalisation changes."""
    sizes = [25_680, 284_000, 3_800_000]
    result = {"all_reduce_parameters": sizes, "all_reduce_seconds": {}}
    for count in (2, 4):
        assert torchrun(count, "all_reduce", str(tmp_path / "seconds.json"), *map(str, sizes)).returncode == 0
        result["all_reduce_seconds"][count] = json.loads((tmp_path / "seconds.json").read_text())
    for count in (1, 2):
        assert torchrun(count, "losses", str(tmp_path / f"{count}.json")).returncode == 0
    alone, together = (np.array(json.loads((tmp_path / f"{count}.json").read_text())["losses"]) for count in (1, 2))
    result["without_batch_norm"] = {"steps": len(alone), "mean_loss": float(alone.mean()),
                                    "largest_difference": float(abs(together - alone).max())}
    runs: dict[int, list] = {1: [], 2: [], 4: []}
    for seed in range(5):
        for count in runs:
            out = tmp_path / f"run{count}-{seed}"
            done = torchrun(count, "command", "none", "-", "train", "--data", "shapes", "--epochs", "4", "--batch-size", "128",
                            "--max-lr", "0.006", "--device", "cpu", "--seed", str(seed), "--out", str(out), "--json")
            assert done.returncode == 0, done.stderr[-3000:]
            last = json.loads(done.stdout.splitlines()[-1])
            runs[count].append({name: last[name] for name in ("train_loss", "test_accuracy")})
    result["with_batch_norm"] = {"model": "spatial_attn", "data": "shapes", "epochs": 4, "batch_size": 128, "runs": runs}
    (ROOT / "nbs" / "studies" / "results" / "processes.json").write_text(json.dumps(result, indent=1) + "\n")
