"""A training that is killed, whenever, and resumed is the training that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attn_cifar.cli import main
from attn_cifar.core import InputError
from attn_cifar.data import load_data
from attn_cifar.files import read_tensors

ROOT = Path(__file__).resolve().parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")


def kill_runs(kills: int, seed: int, folder: Path) -> dict:
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, str(script), str(kills), str(seed), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_fork
def test_killed_runs_end_as_if_left_alone(tmp_path):
    seen = kill_runs(9, 0, tmp_path)
    assert seen["kills"] == 9 and seen["different"] == []


@needs_fork
@pytest.mark.long
def test_many_killed_runs_end_as_if_left_alone(tmp_path):
    seen = kill_runs(60, 1, tmp_path)
    assert seen["kills"] == 60 and seen["different"] == []
    assert seen["inside a write"] >= 3 and seen["before the first checkpoint"] >= 1, "the moments are not random enough"
    (ROOT / "nbs" / "studies" / "results" / "kills.json").write_text(json.dumps(seen, indent=1) + "\n")


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "attn_cifar", "train", "--data", "shapes", "--epochs", "3", "--batch-size", "16", "--max-lr",
            "0.003", "--device", "cpu", "--out", str(folder), *more]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_first(tmp_path, number, code):
    """Stopped in its first epoch, before any checkpoint is due, the command leaves one and says how to go on."""
    process = subprocess.Popen(command(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "steps.csv", process)
    time.sleep(0.5)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and "--resume" in errors and "Traceback" not in errors
    stored = read_tensors(tmp_path / "run" / "checkpoint" / "state.safetensors")
    assert stored["notes"]["history"] == [] and len(stored["state"]["totals"]["sizes"]) >= 1


def test_a_damaged_checkpoint_is_refused_and_nothing_is_lost(tmp_path, monkeypatch, capsys):
    """The command trains a small network on a few images, without a report."""
    monkeypatch.setattr("attn_cifar.report.sections.make_report", lambda run, data: Path(run, "report.html"))
    monkeypatch.setattr("attn_cifar.data.sources.load_data", lambda *_, **__: load_data("shapes").subset(40, 20))
    words = command(tmp_path / "run", "--model", "basic_attn")[3:]
    assert main([*words, "--json"]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    checkpoint = tmp_path / "run" / "checkpoint" / "state.safetensors"
    content = bytearray(before[checkpoint])
    content[-50] ^= 1
    checkpoint.write_bytes(content)
    assert main([*words, "--resume"]) == 2
    errors = capsys.readouterr().err
    assert "damaged" in errors and len(errors.splitlines()) == 1
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == {**before, checkpoint: bytes(content)}
    with pytest.raises(InputError, match="checksum"):
        read_tensors(checkpoint)
