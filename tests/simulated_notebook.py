"""Execute notebooks on a simulated GPU: `python tests/simulated_notebook.py 7.5 nbs/01_data.ipynb …` (see `simulated_gpu.py`)."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from execnb.shell import CaptureShell

from simulated_gpu import simulated_gpu


def execute(path: Path, capability: tuple[int, int]) -> str:
    """Execute a notebook's cells up to the first that fails; return that cell and its error, empty if all succeed."""
    shell = CaptureShell(path.parent, mpl_format="")
    with simulated_gpu(capability):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and source.strip() and "#| eval: false" not in source:
                shell.run(source)
                if shell.exc:
                    return f"{path.name}, cell {number}:\n{source}\n{type(shell.exc).__name__}: {shell.exc}"
    return ""


if __name__ == "__main__":
    major, minor = sys.argv[1].split(".")
    os.environ |= {"ATTN_CIFAR_EPOCHS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "MPLBACKEND": "Agg"}
    failed = []
    for path in [Path(name).resolve() for name in sys.argv[2:]]:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # alone, as on Colab
            failed.append(execute(path, (int(major), int(minor))))
            os.chdir(path.parent)
        print(failed[-1] or f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
    sys.exit(any(failed))
