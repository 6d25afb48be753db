"""A notebook runs on Colab: alone in a folder, with `google.colab` there, the package installed by its first cell."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attn_cifar.models import create_model
from attn_cifar.studies import load_results
from attn_cifar.training import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PIP = '''"""Stands in for pip: it notes what was asked for. The package is installed already."""
import sys
from pathlib import Path

Path(__file__).with_name("asked").open("a").write(" ".join(sys.argv[1:]) + "\\n")
'''
colab = runpy.run_path(str(ROOT / ".github" / "colab.py"))


def test_every_notebook_has_its_badge_and_first_cell():
    """What `make colab` writes is there already."""
    others = "index.ipynb", "package.ipynb", "design.ipynb"
    executed = {path for path in (ROOT / "nbs").rglob("*.ipynb") if path.name not in others}
    assert set(colab["notebooks"]()) == executed and len(executed) > 40
    for path in colab["notebooks"]():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        badge, code = notebook["cells"][1:3]
        text, wanted = colab["head_of"](path, notebook["cells"][:1] + notebook["cells"][3:], *colab["read_settings"]())
        assert "".join(badge["source"]) == text and "".join(code["source"]) == wanted, f"run `make colab` for {path.name}"
        assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] == "T4"


def test_a_published_repository_is_where_everything_comes_from():
    """Badge and first cell name the repository and the branch; extra packages are quoted for the shell."""
    path = ROOT / "nbs" / "report" / "chart.ipynb"
    for address in ("https://github.com/someone/attn_cifar", "https://github.com/someone/attn_cifar.git"):
        text, code = colab["head_of"](path, [{"cell_type": "code", "source": "import onnxruntime"}], address, "trunk")
        assert "colab.research.google.com/github/someone/attn_cifar/blob/trunk/nbs/report/chart.ipynb)" in text
        wanted = '"attn_cifar @ git+https://github.com/someone/attn_cifar.git@trunk" "onnx<1.23" onnxruntime onnxscript'
        assert f"%pip install -q {wanted}" in code and "glob" not in code


@pytest.mark.parametrize(("on_colab", "wheel", "installed"), [(True, True, True), (True, False, False), (False, True, True),
                                                              pytest.param(True, False, True, marks=pytest.mark.long)])
def test_a_notebook_alone(tmp_path, on_colab, wheel, installed):
    """On Colab pip is asked for the wheel beside the notebook, never for a name; without one, a line says what to do."""
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP)
    if on_colab:
        (tmp_path / "site" / "google" / "colab").mkdir(parents=True)
        (tmp_path / "site" / "google" / "colab" / "__init__.py").touch()
    (tmp_path / "content").mkdir()
    for version in ("0.1.0", "0.2.0") if wheel else ():
        (tmp_path / "content" / f"attn_cifar-{version}-py3-none-any.whl").touch()
    path = ROOT / "nbs" / "report" / "chart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"][2]["source"] = colab["head_of"](path, notebook["cells"][3:], "")[1]
    if not installed:  # only the first cell, where the package cannot be found
        hide = "import importlib.util\nreal = importlib.util.find_spec\nimportlib.util.find_spec = lambda name: (\n" \
               "    None if name == 'attn_cifar' else real(name))\n"
        notebook["cells"] = [{**notebook["cells"][2], "source": hide}, {**notebook["cells"][2], "id": "first"}]
    (tmp_path / "content" / "chart.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "chart.ipynb"]
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": places}
    done = subprocess.run(command, cwd=tmp_path / "content", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = tmp_path / "site" / "pip" / "asked"
    assert asked.exists() is (on_colab and wheel)
    if asked.exists():
        assert asked.read_text().split() == ["install", "-q", "./attn_cifar-0.2.0-py3-none-any.whl"]
    cells = json.loads((tmp_path / "content" / "chart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code"), "not everything was executed"
    assert ("upload its wheel" in json.dumps(cells[1].get("outputs"))) is (not installed)


@pytest.mark.parametrize(("gpu", "data", "epochs", "complete"), [
    (True, "cifar10", None, True), (True, "cifar10", "1", False), (False, "cifar10", None, False), (True, "shapes", None, False)])
@pytest.mark.parametrize("name", ["04_training", "quickstart"])
def test_with_a_gpu_the_shipped_network_trains_completely(monkeypatch, capsys, name, gpu, data, epochs, complete):
    """For 24 epochs, and its accuracy is printed next to the stored one; the imitated Colab sets ATTN_CIFAR_EPOCHS."""
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (source,) = (source for source in sources if "ATTN_CIFAR_EPOCHS" in source)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setenv("ATTN_CIFAR_DATA", data)
    monkeypatch.delenv("ATTN_CIFAR_EPOCHS", raising=False)
    if epochs:
        monkeypatch.setenv("ATTN_CIFAR_EPOCHS", epochs)
    calls = []

    def fit(model, data, recipe=None, epochs=None, **options):
        calls.append(epochs or recipe.epochs)
        return SimpleNamespace(history=[{}] * calls[-1], evaluation=SimpleNamespace(accuracy=0.8))

    names = {"fit": fit, "device": "cuda" if gpu else "cpu", "model": None, "data": None, "classes": 10,
             "result": SimpleNamespace(suggestion=0.03), "os": os,
             "torch": torch, "np": np, "create_model": create_model, "RECIPES": RECIPES,
             "load_results": load_results}
    exec(source, names)
    printed = capsys.readouterr().out
    assert calls == ([24] if complete else [2] * (name == "quickstart"))
    assert ("80.0% after 24 epochs" in printed) is complete
    if complete:
        assert "84.5%" in printed and "3 seeds" in printed
