"""The main job as a user starts it: one command, in an empty home directory, to a trained network and its report."""

import json
import os
import subprocess
import sys


def attn_cifar(*words: str, home) -> subprocess.CompletedProcess:
    """Run the installed command line with `home` as its home directory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ATTN_CIFAR_")}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    return subprocess.run([sys.executable, "-m", "attn_cifar", *words], cwd=home, env=environment, capture_output=True,
                          text=True)


def test_the_built_in_images_are_learned_at_the_suggested_learning_rate(tmp_path):
    """A suggested learning rate that diverges, or a data set that became too hard, fails here."""
    done = attn_cifar("train", "--data", "shapes", "--model", "spatial_attn", "--epochs", "3", "--batch-size", "128",
                      "--out", "run", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["test_accuracy"] >= 0.90
    assert (tmp_path / result["report"]).stat().st_size < 3_000_000
    again = attn_cifar("evaluate", "run", "--json", home=tmp_path)
    assert abs(json.loads(again.stdout)["accuracy"] - result["test_accuracy"]) < 1e-9, "the stored and the new measurement differ"
    refused = attn_cifar("train", "--data", "shapes", "--out", "run", home=tmp_path)
    assert refused.returncode == 2 and "already holds a run" in refused.stderr and refused.stderr.count("\n") == 1
