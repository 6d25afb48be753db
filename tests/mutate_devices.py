"""Seed nine device faults, one at a time, and see which tests notice: `python tests/mutate_devices.py`. Takes minutes."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = {  # what is wrong: file, text, replacement
    "mixed devices in augmentation": (
        "data/augmentation.py", "x = torch.arange(width, device=images.device, dtype", "x = torch.arange(width, dtype"),
    "a CPU generator for a GPU tensor": (
        "data/augmentation.py", "torch.rand(8, count, generator=generator)",
        "torch.rand(8, count, generator=generator, device='cuda' if torch.cuda.is_available() else 'cpu')"),
    ".numpy() of a GPU tensor": ("training/log.py", "gathered[:len(self.sizes)].tolist()", "gathered[:len(self.sizes)].numpy().tolist()"),
    "a model that is not moved": ("training/loop.py", "model.to(engine.device)", "model.to('cpu')"),
    "a blocking .item() in every step": ("training/loop.py", "loss = loss.detach()", "loss = loss.item()"),
    "labels left on the CPU": (
        "data/batches.py", "_send(self.labels.index_select(0, where), self.device)", "self.labels.index_select(0, where).cpu()"),
    "a state restored to the wrong device": (
        "training/log.py", 'self.losses.copy_(state["losses"] * first)', 'self.losses = state["losses"].cpu() * first'),
    "a scaler that is not saved": ("training/loop.py", "scaler=trainer.scaler, ", ""),
    "an index on the CPU": ("data/batches.py", "where = _send(index, self.images.device)", "where = index"),
}


def failures(folder: str | Path, *words: str) -> list[str]:
    """Return the tests that fail with the package in a folder."""
    tests = [str(ROOT / "tests" / name) for name in ("test_devices.py", "test_cuda.py")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *words, *tests],
                          env={**os.environ, "PYTHONPATH": str(folder)}, cwd=ROOT / "tests", capture_output=True, text=True)
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]


def caught_by(file: str, text: str, replacement: str) -> str:
    """Return the first test that fails with a fault, empty if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT / "attn_cifar", Path(folder) / "attn_cifar"))
        source = (copy / file).read_text(encoding="utf-8")
        if source.count(text) != 1:
            raise SystemExit(f"{file} has changed: {text!r} occurs {source.count(text)} times")
        (copy / file).write_text(source.replace(text, replacement), encoding="utf-8")
        return next(iter(failures(folder, "-x")), "")


if __name__ == "__main__":
    if failed := failures(ROOT):
        raise SystemExit(f"without any fault, {', '.join(failed)} fails already")
    found = 0
    for name, fault in FAULTS.items():
        test = caught_by(*fault)
        found += bool(test)
        print(f"{name:40} {test or 'not caught'}", flush=True)
    print(f"{found} of {len(FAULTS)} caught")
    sys.exit(found < len(FAULTS) - 1)
