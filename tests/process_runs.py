"""Programs for `torchrun`; called as `process_runs.py WHAT ARGUMENT…`, see the functions. The first process writes results."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from attn_cifar.data import normalize
from attn_cifar.cli import main
from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.training import join_processes, leave_processes
from attn_cifar.training import fit


def command(send: str, marker: str, *words: str) -> None:
    """Run a command line. `send` as SIGTERM@01: those signal themselves after 40 steps of training, once for each marker."""
    name, _, ranks = send.partition("@")
    once, steps = Path(f"{marker}.{os.environ['RANK']}"), 0

    def count(*_):
        nonlocal steps
        steps += 1
        if steps == 40 and not once.exists():
            once.touch()
            os.kill(os.getpid(), getattr(signal, name))

    def counted(*args, **options):
        """Train; steps of the range test before, which the first process alone makes, do not count."""
        if os.environ["RANK"] in ranks:
            register_optimizer_step_post_hook(count)
        return fit(*args, **options)

    with mock.patch("attn_cifar.lr_finder.finder.fit", counted), mock.patch("attn_cifar.training.loop.fit", counted):
        sys.exit(main(words))


def silent(*words: str) -> None:
    """As `command`, without a report at the end."""
    with mock.patch("attn_cifar.report.sections.make_report", lambda run, data: Path(run, "report.html")):
        command(*words)


def losses(path: str) -> None:
    """Train a network without batch normalisation; write its losses. Batches of 33, 33, 33 and 1: one share is empty."""
    torch.manual_seed(join_processes("cpu").rank)  # weights that differ: those of the first process count
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
                          nn.Linear(16 * 49, 10))
    run = fit(model, load_data("shapes").subset(100, 57), epochs=8, batch_size=33, device="cpu", precision="float32",
              compile=False, verbose=False)
    if join_processes().rank == 0:
        Path(path).write_text(json.dumps({"losses": run.steps["loss"], "history": run.history}))


def gradients(path: str) -> None:
    """Write how far our sum of gradients is from that of PyTorch's wrapper, relative to the largest gradient."""
    processes = join_processes("cpu")
    data = load_data("shapes")
    torch.manual_seed(0)
    model = create_model("spatial_attn")
    mine = slice(processes.rank, 64, processes.count)
    images = normalize(torch.from_numpy(data.train_images[:64].copy())[mine], data.mean, data.std)
    labels = torch.from_numpy(data.train_labels[:64].copy())[mine]
    wrapped = nn.parallel.DistributedDataParallel(model)
    nn.functional.cross_entropy(wrapped(images), labels).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (nn.functional.cross_entropy(model(images), labels) * len(labels) / 64).backward()
    own = [p.grad.clone() for p in model.parameters()]
    processes.add([p.grad for p in model.parameters()])
    largest = max(e.abs().max() for e in expected)
    difference = max((p.grad - e).abs().max() for p, e in zip(model.parameters(), expected, strict=True)) / largest
    alone = max((o - e).abs().max() for o, e in zip(own, expected, strict=True)) / largest
    if processes.rank == 0:
        Path(path).write_text(json.dumps({"difference": difference.item(), "without adding": alone.item()}))


def all_reduce(path: str, *sizes: str) -> None:
    """Write the median seconds of adding gradients of several sizes."""
    processes = join_processes("cpu")
    seconds = {}
    for size in sizes:
        values = torch.ones(int(size))
        times = []
        for _ in range(51):
            processes.agree(0)  # begin together
            started = time.perf_counter()
            processes.add([values])
            times.append(time.perf_counter() - started)
        seconds[size] = sorted(times[1:])[25]
    if processes.rank == 0:
        Path(path).write_text(json.dumps(seconds))


if __name__ == "__main__":
    {function.__name__: function for function in (command, silent, losses, gradients, all_reduce)}[sys.argv[1]](*sys.argv[2:])
    leave_processes(0)
