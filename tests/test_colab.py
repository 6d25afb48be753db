"""A notebook runs on Colab: alone in a folder, with `google.colab` there, the package installed by its first cell."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = '''"""Stands in for pip: it notes what was asked for. The package is installed already."""
import sys
from pathlib import Path

Path(__file__).with_name("asked").open("a").write(" ".join(sys.argv[1:]) + "\\n")
'''
colab = runpy.run_path(str(ROOT / ".github" / "colab.py"))


def test_every_notebook_has_its_badge_and_first_cell():
    """What `make colab` writes is there already."""
    executed = {path for path in (ROOT / "nbs").rglob("*.ipynb") if path.name not in ("index.ipynb", "package.ipynb")}
    assert set(colab["notebooks"]()) == executed and len(executed) > 40
    for path in colab["notebooks"]():
        notebook = json.loads(path.read_text(encoding="utf-8"))
        badge, code = notebook["cells"][1:3]
        text, wanted = colab["head_of"](path, notebook["cells"][:1] + notebook["cells"][3:])
        assert "".join(badge["source"]) == text and "".join(code["source"]) == wanted, f"run `make colab` for {path.name}"
        assert notebook["metadata"]["accelerator"] == "GPU" and notebook["metadata"]["colab"]["gpuType"] == "T4"


@pytest.mark.parametrize("on_colab", (True, False))
def test_a_notebook_alone(tmp_path, on_colab):
    """On Colab pip is asked for the package, and nothing else; elsewhere it is not. Cells then run with nothing beside them."""
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(PIP)
    if on_colab:
        (tmp_path / "site" / "google" / "colab").mkdir(parents=True)
        (tmp_path / "site" / "google" / "colab" / "__init__.py").touch()
    (tmp_path / "content").mkdir()
    shutil.copy(ROOT / "nbs" / "report" / "chart.ipynb", tmp_path / "content")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "chart.ipynb"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": path}
    done = subprocess.run(command, cwd=tmp_path / "content", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    asked = tmp_path / "site" / "pip" / "asked"
    assert asked.exists() is on_colab
    if on_colab:
        assert asked.read_text().split() == ["install", "-q", "--find-links", ".", "attn_cifar"]
    cells = json.loads((tmp_path / "content" / "chart.ipynb").read_text(encoding="utf-8"))["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code"), "not everything was executed"
