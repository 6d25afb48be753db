"""Kill trainings with SIGKILL at random moments, resume each until it ends, and compare it with one that was left alone.

Called as `python kill_runs.py KILLS SEED FOLDER`; prints one JSON object. Processes are forked, so that a start costs nothing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard  # noqa: F401, imported once for all forks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.training import fit

COMPARED = ("model.safetensors", "evaluation.safetensors", "metrics.csv", "steps.csv")


def train(folder: Path) -> None:
    """Train 3 epochs of 10 steps, a checkpoint after each step: a good part of the time goes to writing them."""
    torch.manual_seed(0)
    fit(create_model("attn_tiny"), DATA, recipe="tiny", epochs=3, batch_size=16, device="cpu", compile=False, out=folder,
        resume=True, checkpoint_seconds=0, verbose=False)


def start(folder: Path) -> int:
    """Train in a new process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def wait_for_write(folder: Path, until: float) -> None:
    """Return when a checkpoint is being written, or at a moment of `time.monotonic()`."""
    checkpoint = folder / "checkpoint"
    while not any(checkpoint.glob(".state.safetensors.*.tmp")) and time.monotonic() < until:
        pass


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all points of a run in TensorBoard."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def main(kills: int, seed: int, folder: Path) -> dict:
    """Kill that many processes; return what was seen."""
    chance = random.Random(seed)
    train(folder / "first")  # what is done once a process is done here, before all forks
    started = time.monotonic()
    _, status = os.waitpid(start(folder / "whole"), 0)
    assert status == 0, "the training fails without being killed"
    length = time.monotonic() - started
    done = {"kills": 0, "inside a write": 0, "before the first checkpoint": 0, "runs": 0, "different": []}
    while done["kills"] < kills:
        run = folder / f"run{done['runs']}"
        status = -1
        while status != 0:
            child = start(run)
            if done["kills"] < kills:
                time.sleep(chance.uniform(0.02, 0.9) * length)
                if done["kills"] % 3 == 0:  # every third one waits for the next write to begin
                    wait_for_write(run, until=time.monotonic() + 0.2 * length)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                done["kills"] += 1
                done["inside a write"] += any(run.rglob(".*.tmp"))
                done["before the first checkpoint"] += not (run / "checkpoint" / "state.safetensors").exists()
            elif status:
                raise SystemExit(f"a resumed training failed with status {status}")
        done["runs"] += 1
        for name in COMPARED:
            if (run / name).read_bytes() != (folder / "whole" / name).read_bytes():
                done["different"].append(f"{run.name}/{name}")
        if scalars(run) != scalars(folder / "whole"):
            done["different"].append(f"{run.name}/tensorboard")
        if left := [path.name for path in run.rglob(".*.tmp")]:
            done["different"].append(f"{run.name}: left {left}")
    return done


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with a pool of threads must not be forked
    DATA = load_data("shapes").subset(160, 50)
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
