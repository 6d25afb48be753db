"""The repository agrees with itself: notebooks, exported package, README and the order of the modules."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "attn_cifar"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
WRITTEN_BY_HAND = {"__init__.py", "__main__.py", "faithfulness.py", "runs.py"}  # the last two: names of 0.1.0
# A path of one machine, though not inside a URL, a word or base64.
HOME_PATH = re.compile(r"(?<![\w+/.:])(?:/home/|/root/|/Users/|/tmp/|/var/folders/)\w|\b[A-Z]:\\Users\\")
# Imports go one way: a module imports from modules of its own package and from packages further left.
LAYERS = ("core", "files", "data", "models", "training", "lr_finder explain", "visualization", "predict", "report",
          "app studies s9 lr_finder_compat", "cli")

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))


def run_tool(name: str, *arguments: str, folder: Path) -> None:
    """Run one of nbdev's commands in a folder, and show what it said if it fails."""
    command = [str(Path(sys.executable).parent / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def project_copy(tmp_path_factory) -> Path:
    """Copy what nbdev reads, without the exported modules, so that its commands cannot touch the repository."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "settings.ini", copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    (copy / "attn_cifar").mkdir()
    for name in WRITTEN_BY_HAND:
        shutil.copy(PACKAGE / name, copy / "attn_cifar")
    return copy


def test_package_equals_export(project_copy):
    run_tool("nbdev_export", folder=project_copy)

    def modules(package: Path) -> dict[str, bytes]:
        return {str(p.relative_to(package)): p.read_bytes() for p in sorted(package.rglob("*.py"))}

    committed, exported = modules(PACKAGE), modules(project_copy / "attn_cifar")
    different = {name for name in committed | exported if committed.get(name) != exported.get(name)}
    assert not different, f"run `make export`: the notebooks say otherwise in {sorted(different)}"


def test_notebooks_are_clean(project_copy):
    run_tool("nbdev_clean", folder=project_copy)
    changed = [str(p.relative_to(ROOT)) for p in NOTEBOOKS
               if p.read_bytes() != (project_copy / p.relative_to(ROOT)).read_bytes()]
    assert not changed, f"run `nbdev_clean`: it would change {changed}"


def stored_text(output: dict) -> str:
    """Return what a stored output says in words: its stream, plain text, HTML and Markdown, no pixels."""
    data = output.get("data", {})
    kinds = [output.get("text", ""), *(value for kind, value in data.items() if kind.startswith("text/"))]
    return "\n".join("".join(value) for value in kinds)


@each_notebook
def test_stored_outputs(notebook):
    assert notebook.stat().st_size <= 1_500_000, "heavier than 1.5 MB: store smaller figures"
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        where = f"under {''.join(cell['source'])[:200]!r}"
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"an error is stored {where}"
            assert output.get("name") != "stderr", f"warnings or a progress bar are stored {where}"
            assert not re.search(r"\d%\|.*\| *\d+/\d+", stored_text(output)), f"a progress bar is stored {where}"
            found = HOME_PATH.search(stored_text(output))
            assert not found, f"a path of one machine is stored {where}: {found.string[found.start():][:80]!r}"
        found = HOME_PATH.search("".join(cell["source"]))
        assert not found, f"a path of one machine is written {where}"


@each_notebook
def test_stored_outputs_come_from_the_images_that_are_named(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    words = "\n".join("".join(cell["source"]) for cell in cells)
    named = re.search("stored outputs come from (CIFAR-10|the built-in `shapes`|`shapes`)", words)
    printed = "\n".join(stored_text(output) for cell in cells for output in cell.get("outputs", []))
    if named:
        other = "crescent|hourglass" if named.group(1) == "CIFAR-10" else "airplane|automobile"
        assert not re.search(other, printed), f"outputs are said to come from {named.group(1)}"


def test_home_path_knows_a_path_from_a_url():
    assert HOME_PATH.search("saved to /home/ann/runs") and HOME_PATH.search("'/tmp/tmpab12/x.png'")
    assert not HOME_PATH.search("https://example.org/home/ann") and not HOME_PATH.search("iVBORw0KGgo/tmp/AAA")
    assert not HOME_PATH.search("./tmp/x") and not HOME_PATH.search("runs/home/x")


def test_readme_equals_index():
    made = runpy.run_path(str(ROOT / ".github" / "readme.py"))["make_readme"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == made, "run `make readme`: nbs/index.ipynb says otherwise"


def test_relative_links_of_the_readme_exist():
    """The README stands one folder above its notebook, so a link that works in one could be broken in the other."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r'(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^)"#\s]+)', text)
    broken = [link for link in links if not (ROOT / link).exists()]
    assert not broken, f"README.md points at {broken}"


def promises() -> list[tuple[str, str]]:
    """Return the rows of the book's table of promises, as stored: (promise, what keeps it)."""
    cells = json.loads((ROOT / "nbs" / "design.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join(stored_text(output) for cell in cells for output in cell.get("outputs", []))
    return [(promise, keeper) for promise, keeper in re.findall(r"^\| (.+) \| (.+) \|$", text, re.MULTILINE)
            if promise != "promise" and set(promise) != set("-")]


def missing_keepers(keeper: str) -> list[str]:
    """Return the tests and notebooks that are named as keeping a promise and do not exist; `::test` is in the file before it."""
    missing, file = [], None
    for path, test in re.findall(r"`(tests/\w+\.py)?(?:::(\w+))?`", keeper):
        file = path or file
        if not path and not test:
            continue
        source = (ROOT / file).read_text(encoding="utf-8") if file and (ROOT / file).is_file() else ""
        if not test or not re.search(rf"^def {test}\(", source, re.MULTILINE):
            missing.append(f"{path}::{test}")
    return missing + [link for link in re.findall(r"\]\(([^)#]+)", keeper) if not (ROOT / "nbs" / link).is_file()]


def test_every_promise_names_the_tests_that_keep_it():
    rows = promises()
    assert len(rows) >= 18, "the table was not found"
    for promise, keeper in rows:
        assert re.search(r"`tests/\w+\.py::\w+`|\.ipynb\)", keeper), f"nothing keeps: {promise}"
        assert not missing_keepers(keeper), f"{promise}: {missing_keepers(keeper)} do not exist"
    assert missing_keepers("`tests/test_repository.py::test_not_there`") and missing_keepers("[gone](gone.ipynb)")
    assert missing_keepers("`tests/test_repository.py`"), "a file is no test"


def exported_modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Return the modules that come from notebooks, by their dotted name; a package by its own."""
    by_hand = {package / name for name in WRITTEN_BY_HAND}
    paths = [path for path in package.rglob("*.py") if path not in by_hand and path.name != "_modidx.py"]
    return {".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(module: Path, package: Path = PACKAGE) -> set[str]:
    """Return the modules of attn_cifar that a module imports anywhere, inside functions too, but not for type checkers alone."""
    nodes = list(ast.walk(ast.parse(module.read_text(encoding="utf-8"))))
    never_run = {inner for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
                 for inner in ast.walk(node)}
    folder = ("attn_cifar", *module.relative_to(package).parts[:-1])
    names: set[str] = set()
    for node in (node for node in nodes if node not in never_run):
        if isinstance(node, ast.ImportFrom):
            above = folder[:len(folder) - node.level + 1] if node.level else ()
            path = ".".join([*above, *(node.module.split(".") if node.module else ())])
            names |= {path, *(f"{path}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("attn_cifar.") for name in names} & exported_modules(package).keys()


def backward_imports(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """Return (module, what it imports) for every import that does not point to a lower layer or into its own package."""
    rank = {name: place for place, names in enumerate(LAYERS) for name in names.split()}

    def layer(module: str) -> str:
        return module.split(".")[0]

    return {(name, needed) for name, path in exported_modules(package).items() for needed in imports_of(path, package)
            if layer(name) != layer(needed) and rank[layer(needed)] >= rank[layer(name)]}


def test_the_modules_are_those_that_notebooks_export():
    """A search that overlooks a folder would find no fault there."""
    lines = {name for path in NOTEBOOKS for name in re.findall(r"#\|\s*default_exp ([\w.]+)", path.read_text(encoding="utf-8"))}
    assert len(lines) > 50 and exported_modules().keys() == {name.removesuffix(".__init__") for name in lines}
    assert {name.split(".")[0] for name in exported_modules()} == set(" ".join(LAYERS).split())


def test_imports_go_one_way():
    assert not backward_imports(), f"(module, what it imports from a higher layer): {sorted(backward_imports())}"
    graph = {name: imports_of(path) - {name} for name, path in exported_modules().items() if path.name != "__init__.py"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


@pytest.mark.parametrize("line", ["from attn_cifar.training import fit", "from ..training.loop import fit",
                                  "def later():\n    from attn_cifar.report import make_report"])
def test_a_backward_import_is_noticed(tmp_path, line):
    """A planted fault, at the top of a module and inside a function, absolute and relative."""
    package = shutil.copytree(PACKAGE, tmp_path / "attn_cifar", ignore=shutil.ignore_patterns("__pycache__", "pretrained"))
    with open(package / "models" / "networks.py", "a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    assert {name for name, _ in backward_imports(package)} == {"models.networks"}


def test_no_private_name_crosses_packages():
    """`_name` belongs to its package: others would depend on what may change."""
    crossing = []
    for name, path in exported_modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level > 1 or (node.level and path.parent == PACKAGE)
                                                     or (node.module or "").startswith("attn_cifar")):
                crossing += [f"{name}: {alias.name}" for alias in node.names if alias.name.startswith("_")
                             and not alias.name.startswith("__")]
    assert not crossing


def test_light_modules_bring_in_no_heavy_library():
    heavy = {"albumentations", "cv2", "tensorboard", "matplotlib", "torchvision"}
    code = ("import sys; import attn_cifar.data, attn_cifar.models, attn_cifar.lr_finder, attn_cifar.explain\n"
            "from attn_cifar.training import fit\n"
            f"print(*sorted({heavy!r} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.split(), f"import these when first needed: {done.stdout}"


def test_hooks_clean_on_saving_and_merge_cell_by_cell(tmp_path):
    """Two people who ran the same notebook and changed different cells get both changes, not a conflict in execution counts."""
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    (project / "nbs").mkdir(parents=True)
    for name in ("settings.ini", ".gitattributes", ".gitconfig", ".gitignore"):
        shutil.copy(ROOT / name, project)
    run = {"cwd": project, "capture_output": True, "text": True, "check": True}
    run["env"] = {**os.environ, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    path = project / "nbs" / "00_it.ipynb"

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments], **run)

    def commit(count: int, words: str, other: str) -> None:
        cells = [{"cell_type": "code", "id": f"cell{i}", "execution_count": count, "metadata": {}, "source": [text],
                  "outputs": [{"output_type": "stream", "name": "stdout", "text": [f"{count}\\n"]}]}
                 for i, text in enumerate((words, other))]
        content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        path.write_text(json.dumps(content, indent=1) + "\n")
        git("add", "-A")
        git("commit", "-qm", "a change")

    git("init", "-q", "-b", "main")
    subprocess.run(["nbdev_install_hooks"], **run)
    commit(1, "print(1)", "a = 2")
    git("checkout", "-qb", "theirs")
    commit(7, "print(1)", "a = 3")
    git("checkout", "-q", "main")
    commit(5, "print(5)", "a = 2")
    git("merge", "-q", "--no-edit", "theirs")
    cells = json.loads(path.read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ["print(5)", "a = 3"]
    status = subprocess.run(["git", "status", "--short"], **run).stdout
    assert not status, f"installing the hooks leaves something to commit: {status}"

    save = runpy.run_path(str(home / ".jupyter" / "jupyter_server_config.py"),
                          {"c": types.SimpleNamespace(ContentsManager=types.SimpleNamespace())})["nbdev_clean_jupyter"]
    model = {"type": "notebook", "content": nbformat.read(path, 4)}
    save(path=str(path), model=model)
    assert all(cell["execution_count"] is None for cell in model["content"]["cells"])
