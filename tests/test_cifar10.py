"""CIFAR-10 as torchvision delivers it, from an archive of its form that a server on loopback hands out."""

import hashlib
import io
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from attn_cifar.core import InputError
from attn_cifar.data import load_data

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve a small archive of CIFAR-10's form; return its folder, images and labels."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8), np.arange(60) % 10
    members, sums = {}, {}
    for number, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        part = slice(10 * number, 10 * number + 10)
        batch = {"data": images[part].transpose(0, 3, 1, 2).reshape(10, -1), "labels": labels[part].tolist()}
        members[name] = pickle.dumps(batch)
    members["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    folder = tmp_path / "served"
    folder.mkdir()
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in members.items():
            sums[name] = hashlib.md5(content).hexdigest()
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: QuietHandler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("ATTN_CIFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    yield folder, images, labels
    server.shutdown()


def test_download_check_and_cache(served, monkeypatch):
    _, images, labels = served
    data = load_data("cifar10")
    assert np.array_equal(data.train_images, images[:50]) and np.array_equal(data.test_images, images[50:])
    assert np.array_equal(data.train_labels, labels[:50]) and data.test_labels.dtype == np.int64
    assert list(data.class_names) == CLASSES and data.name == "cifar10"
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/gone")
    assert np.array_equal(load_data("cifar10").train_images, images[:50]), "the second time needs no network"


def test_damaged_download_is_named_and_never_unpickled(served, monkeypatch):
    folder, *_ = served
    archive = folder / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100] + bytes(100))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("unpickled"))
    for _ in range(2):  # while downloading, and when the damaged file is found in the cache
        with pytest.raises(InputError, match=f"(?s)MD5.*{CIFAR10.tgz_md5}.*Delete it"):
            load_data("cifar10")
