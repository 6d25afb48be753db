"""Give every notebook with code to run its Colab badge, first cell and GPU runtime; `--try` executes them as Colab would."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "nbs" / "studies" / "results" / "notebooks.json"
VERSIONS = ROOT / ".github" / "colab.txt"
# What a notebook imports, and the package it is in. Newer versions of onnx would replace Colab's protobuf.
EXTRAS = {"timm": "timm", "pytorch_grad_cam": "grad-cam", "captum": "captum", "torch_lr_finder": "torch-lr-finder",
          "hypothesis": "hypothesis", "gradio": "gradio", "onnxruntime": '"onnx<1.23" onnxruntime onnxscript'}
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link}) {words}"
CELL = """#| hide
# On Colab: install the package (Colab's own torch stays) and use CIFAR-10; elsewhere this does nothing.
import os
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab"):
{install}
    os.environ.setdefault("ATTN_CIFAR_DATA", "cifar10")"""
FROM_GIT = """    %pip install -q "attn_cifar @ git+{address}" {extras}"""
FROM_WHEEL = """    from glob import glob  # a wheel by its path, never a package by its name: anybody could register that

    if wheels := sorted(glob("./attn_cifar-*.whl")):
        %pip install -q {{wheels[-1]}} {extras}
    elif not find_spec("attn_cifar"):
        print("attn_cifar is missing: upload its wheel (python -m build --wheel) beside this notebook and run this cell again")"""


def notebooks() -> list[Path]:
    """Return the notebooks that run on Colab, in their order."""
    first = [*sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")), ROOT / "nbs" / "quickstart.ipynb"]
    details = [path for path in sorted((ROOT / "nbs").glob("*/*.ipynb")) if path.name != "package.ipynb"]
    return [*first, *details]


def place_of(path: Path) -> str:
    """Return what names a notebook in the stored times: its path below nbs, without the ending."""
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def read_settings() -> tuple[str, str]:
    """Return the repository's address, empty if it has none, and its branch."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["git_url"].strip().rstrip("/"), settings["DEFAULT"]["branch"].strip()


def head_of(path: Path, cells: list[dict], git_url: str, branch: str = "main") -> tuple[str, str]:
    """Return the text with the badge and the first code cell of a notebook."""
    repository = git_url.removeprefix("https://github.com/").removesuffix(".git")
    link = "https://colab.research.google.com"  # it asks for the file
    if git_url:
        link += f"/github/{repository}/blob/{branch}/{path.relative_to(ROOT).as_posix()}"
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    wanted = [package for module, package in EXTRAS.items() if re.search(rf"^\s*(import|from) {module}\b", source, re.MULTILINE)]
    seconds = json.loads(TIMES.read_text(encoding="utf-8"))["seconds"].get(place_of(path)) if TIMES.exists() else None
    words = "" if seconds is None else (
        f"{say(seconds)} on a CPU.")
    install = FROM_GIT if git_url else FROM_WHEEL
    lines = install.format(address=f"{git_url.removesuffix('.git')}.git@{branch}", extras=" ".join(wanted)).splitlines()
    return BADGE.format(link=link, words=words).strip(), CELL.format(install="\n".join(line.rstrip() for line in lines))


def say(seconds: float) -> str:
    """Return a time in words."""
    return "Less than a minute" if seconds < 50 else f"About {max(1, round(seconds / 60))} minute{'s' * (seconds >= 90)}"


def stamp(path: Path) -> bool:
    """Write a notebook's head where it is missing or another; tell whether anything changed."""
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    cells = [cell for cell in notebook["cells"] if cell["id"] not in ("colab-badge", "colab-cell")]
    text, code = head_of(path, cells, *read_settings())
    head = [{"cell_type": "markdown", "id": "colab-badge", "metadata": {}, "source": text.splitlines(True)},
            {"cell_type": "code", "execution_count": None, "id": "colab-cell", "metadata": {}, "outputs": [],
             "source": code.splitlines(True)}]
    notebook["cells"] = [cells[0], *head, *cells[1:]]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    notebook["metadata"] = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}, "kernelspec": kernel}
    after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    path.write_text(after, encoding="utf-8")
    return after != before


def imitate(data: str, python: str, names: list[str]) -> None:
    """Execute notebooks, alone and in their order, beside Colab's versions; store how long each takes. Needs pip's network."""
    wanted = [path for path in notebooks() if not names or path.stem in names]
    with tempfile.TemporaryDirectory() as folder:
        home, alone = Path(folder), Path(folder) / "content"
        (home / "site" / "google" / "colab").mkdir(parents=True)
        (home / "site" / "google" / "colab" / "__init__.py").touch()
        alone.mkdir()
        copy = shutil.copytree(ROOT, home / "source", ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "_docs", "build"))
        run = partial(subprocess.run, check=True)
        run([python, "-m", "venv", str(home / "venv")])
        colab = [str(home / "venv" / "bin" / "python"), "-m"]
        run([*colab, "pip", "install", "-q", "-r", str(VERSIONS)])
        run([*colab, "pip", "wheel", "-q", "--no-deps", "-w", str(home / "wheels"), str(copy)])
        shutil.copy(next((home / "wheels").glob("attn_cifar-*.whl")), alone)
        before = run([*colab, "pip", "freeze"], capture_output=True, text=True).stdout.splitlines()
        environment = {**os.environ, "PYTHONPATH": str(home / "site"), "ATTN_CIFAR_DATA": data, "ATTN_CIFAR_EPOCHS": "1",
                       "PYDEVD_DISABLE_FILE_VALIDATION": "1", "HOME": str(home),
                       "PATH": f"{home / 'venv' / 'bin'}:{os.environ['PATH']}"}
        found: dict[str, float] = {}
        for path in wanted:
            shutil.copy(path, alone)
            started = time.perf_counter()
            run([*colab, "nbconvert", "--log-level", "ERROR", "--to", "notebook", "--execute", "--inplace", path.name], cwd=alone,
                env=environment)
            found[place_of(path)] = round(time.perf_counter() - started, 1)
            print(place_of(path), found[place_of(path)], flush=True)
        after = run([*colab, "pip", "freeze"], capture_output=True, text=True).stdout.splitlines()
        changed = set(before) - set(after)
        assert not changed, f"the notebooks replaced what was there: {sorted(changed)}"
        shutil.copytree(alone, ROOT / "build" / "colab", dirs_exist_ok=True, ignore=lambda _, names: [
            name for name in names if not name.endswith(".ipynb")])
    if names:
        return
    stored = {"command": "python .github/colab.py --try", "data": Path(data).name, "seconds": found}
    TIMES.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--try", action="store_true", dest="attempt", help="execute all notebooks in an imitated Colab")
    parser.add_argument("--data", default="cifar10", help="a source of images, as for attn-cifar train")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to imitate Colab with: Python 3.12")
    parser.add_argument("names", nargs="*", help="notebooks to execute, without folder and ending (default: all)")
    arguments = parser.parse_args()
    if arguments.attempt:
        imitate(arguments.data, arguments.python, arguments.names)
    print(f"{sum(map(stamp, notebooks()))} notebooks changed")
