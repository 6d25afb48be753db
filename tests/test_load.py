"""A long run holds its memory, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from attn_cifar.data import Batches

PROGRAM = """
import ctypes, gc, json, os, sys, threading
from pathlib import Path
import torch
from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.training import loop

epochs, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
data = load_data("shapes").subset(480, 96)
memory = []
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda keep: None)


def resident():
    trim(0)  # gives back what is free: the C library keeps it for later, and by how much comes and goes by megabytes
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0])


def held():
    gc.collect()
    return {"files": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task")),
            "python threads": threading.active_count(), "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
            "shared memory": sorted(name for name in os.listdir("/dev/shm") if str(os.getpid()) in name)}  # not others'


class Noting(list):  # the history: each epoch appends to it
    def append(self, row):
        super().append(row)
        memory.append(resident())


def train(count, out):
    loop.Run = lambda *arguments: Run(*arguments[:2], Noting(), *arguments[3:])
    torch.manual_seed(0)
    loop.fit(create_model("spatial_attn"), data, out=out, recipe="upstream", epochs=count, batch_size=16, device="cpu",
                 compile=False, verbose=False, checkpoint_seconds=0.1)


Run = loop.Run
train(2, folder + "/first")  # what a process needs once: threads, imports, buffers
before = held()
memory.clear()
train(epochs, folder + "/run")
print(json.dumps({"memory": memory, "before": before, "after": held()}))
"""


def test_a_run_of_24_epochs_holds_its_memory(tmp_path):
    """From the second epoch on, memory grows by one percent at most; files, threads and processes are as before."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process what it holds")
    done = subprocess.run([sys.executable, "-c", PROGRAM, "24", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    memory = seen["memory"]
    assert len(memory) == 24
    # what is left grows by 0.1 MB an epoch, with the numbers kept of each step; means of eight epochs tell a leak from noise
    assert np.mean(memory[-8:]) <= 1.01 * np.mean(memory[2:10]), [value // 1024 for value in memory]
    assert seen["after"] == seen["before"]


def test_images_in_a_file_are_not_kept_in_memory(tmp_path):
    """A pass over a mapped file of 100 MB leaves none of its pages in the process."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the system does not tell a process what it holds")
    path = tmp_path / "images.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.uint8, (34_000, 32, 32, 3))
    stored[:] = np.arange(32, dtype=np.uint8)[:, None]
    del stored

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in maps)

    for mode, kept in (("r", False), ("c", True)):
        images = np.load(path, mmap_mode=mode)
        batches = Batches(images, np.zeros(34_000, np.int64), 500, mean=(0.5,) * 3, std=(0.5,) * 3, shuffle=True)
        largest = max(resident() for _ in batches)
        assert (largest > 50_000) is kept, f"{largest} kB of a file mapped with mode {mode}"
        assert torch.equal(next(iter(batches))[0][0], next(iter(batches))[0][1])
        del images, batches
