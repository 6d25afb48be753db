"""Make the book, a static site in _docs/, from the notebooks and the docstrings: `make docs`."""

import ast
import html.parser
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_docs"
CONFIGURATION = """
project, author, version = {name!r}, {author!r}, {version!r}
copyright = {copyright!r}
extensions = ["myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline"]
nb_execution_mode = "off"  # the outputs are those that the notebooks store
nb_merge_streams = True
nb_render_markdown_format = "gfm"  # tables in outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {{"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True,
                      "pygments_dark_style": "a11y-high-contrast-dark", "navbar_persistent": []}}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
"""
BADGE = "![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)"
STYLE = """
.bd-article img { height: auto; }
html[data-theme=dark] .bd-content .cell_output img { background: #fff; border-radius: 4px; }
.bd-article table { display: block; overflow-x: auto; font-size: .875em; }
.bd-article table td, .bd-article table th { padding: .35rem .5rem; }
.bd-article :not(pre) > code { overflow-wrap: anywhere; }
"""
SCRIPT = """
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table")) table.tabIndex = 0;  // it may scroll sideways
  for (const button of document.querySelectorAll(".search-button-field")) button.removeAttribute("aria-label");  // has a text
});
"""


def title_of(path: Path) -> str:
    """Return the first heading of a notebook."""
    return next(re.findall(r"^# (.+)", "".join(cell["source"]), re.MULTILINE)[0]
                for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown")


def copy_notebook(path: Path, out: Path) -> None:
    """Copy a notebook without what is meant for nbdev: hidden cells, the module's name, directives."""
    notebook, kept = json.loads(path.read_text(encoding="utf-8")), []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if not source.strip() or re.match(r"#\|\s*(hide|default_exp)", source):
            continue
        source = source.replace(BADGE, "Open in Colab")  # a picture from the network
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
            if path.parent.name == "studies":  # an argument, whose code is a click away
                cell["metadata"]["tags"] = ["hide-input"]
        cell["source"] = source.splitlines(keepends=True)
        for data in (output["data"] for output in cell.get("outputs", []) if "text/markdown" in output.get("data", {})):
            text = "".join(data["text/markdown"])  # links in outputs are left as they are: they have to name the pages
            data["text/markdown"] = re.sub(r"\]\(([^):]+)\.ipynb\)", r"](\1.html)", text)
        kept.append(cell)
    notebook["cells"] = kept
    notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(notebook), encoding="utf-8")


def head_of(source: str, node: ast.AST) -> str:
    """Return what stands before the body of a function or class: its signature with the comment of each parameter."""
    lines, body = source.splitlines(), node.body
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    end = body[0].lineno - 1 if body[0].lineno > node.lineno else node.lineno
    indent = len(lines[start]) - len(lines[start].lstrip())
    return "\n".join(line[indent:] for line in lines[start:end]).rstrip()


def describe(source: str, node: ast.AST, level: int = 2) -> list[str]:
    """Return a function or class of a module as Markdown: signature, docstring, fields and public methods."""
    words, parts = ast.get_docstring(node) or "", []
    if isinstance(node, ast.ClassDef):
        parts = [f"{'#' * level} {node.name}", words]
        fields = [ast.get_source_segment(source, item) + comment_of(source, item) for item in node.body
                  if isinstance(item, ast.AnnAssign) and not item.target.id.startswith("_")]
        parts.append("```python\n" + "\n".join([head_of(source, node), *(f"    {line}" for line in fields)]) + "\n```")
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and (item.name == "__init__" or not item.name.startswith("_")):
                parts += describe(source, item, level + 1)
        return parts
    return [f"{'#' * level} {node.name}" if node.name != "__init__" else "", words, f"```python\n{head_of(source, node)}\n```"]


def comment_of(source: str, node: ast.AST) -> str:
    """Return the comment that stands behind a field."""
    rest = source.splitlines()[node.end_lineno - 1][node.end_col_offset:].strip()
    return f"  {rest}" if rest.startswith("#") else ""


def public_names(tree: ast.Module) -> list[str]:
    """Return what `__all__` of a module lists."""
    return next((ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], "id", "") == "__all__"), [])


def api_page(name: str, notebooks: dict[str, str]) -> str:
    """Return the page of a package or module: the public names of each module, with signatures, comments and docstrings."""
    path = ROOT / "attn_cifar" / name
    modules = sorted(path.glob("[a-z]*.py")) if path.is_dir() else [path.with_suffix(".py")]
    parts = [f"# {name}"]
    if path.is_dir():
        exposed = public_names(ast.parse((path / "__init__.py").read_text(encoding="utf-8")))
        parts.append(f"`from attn_cifar.{name} import …`: " + ", ".join(f"`{one}`" for one in sorted(exposed)) + ".")
    for module in modules:
        source = module.read_text(encoding="utf-8")
        tree = ast.parse(source)
        dotted = f"{name}.{module.stem}" if path.is_dir() else name
        parts += [f"## {dotted}" if path.is_dir() else "", ast.get_docstring(tree) or "",
                  f"Source, explanation and tests: [its notebook](../{notebooks[dotted]})." if dotted in notebooks else ""]
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public_names(tree):
                parts += describe(source, node, 3 if path.is_dir() else 2)
    return "\n\n".join(part for part in parts if part) + "\n"


def write_source(folder: Path) -> None:
    """Write what Sphinx reads."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    names = {key: settings["DEFAULT"][key] for key in ("author", "version", "copyright")}
    (folder / "conf.py").write_text(CONFIGURATION.format(name=settings["DEFAULT"]["lib_name"], **names), encoding="utf-8")
    (folder / "_static").mkdir()
    (folder / "_static" / "site.css").write_text(STYLE, encoding="utf-8")
    (folder / "_static" / "site.js").write_text(SCRIPT, encoding="utf-8")
    shutil.copytree(ROOT / "nbs" / "images", folder / "nbs" / "images")
    chapters, details, studies, origins = ["Quickstart <nbs/quickstart>"], [], [], {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        place = path.relative_to(ROOT)
        if path.name in ("index.ipynb", "package.ipynb") or ".ipynb_checkpoints" in path.parts:
            continue
        copy_notebook(path, folder / place)
        group = chapters if path.parent.name == "nbs" else studies if path.parent.name == "studies" else details
        if path.name != "quickstart.ipynb":
            number = f"{int(path.name[:2])}. " if path.name[0].isdigit() else ""
            group.append(f"{number}{title_of(path)} <{place.with_suffix('').as_posix()}>")
        for name in re.findall(r"#\|\s*default_exp ([\w.]+)", path.read_text(encoding="utf-8")):
            origins[name] = place.as_posix()
    package = ROOT / "attn_cifar"
    modules = {path.stem for path in package.glob("[a-z]*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    modules = sorted(modules)
    (folder / "api").mkdir()
    for module in modules:
        (folder / "api" / f"{module}.md").write_text(api_page(module, origins), encoding="utf-8")
    home = (ROOT / "README.md").read_text(encoding="utf-8")
    home = re.sub(r"\[(`tests/[^\]]+)\]\([^)]*\)", r"\1", home)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    contents = [("Chapters", chapters), ("Details", details), ("Studies", studies),
                ("Reference", [f"api/{name}" for name in modules]), ("Project", ["CONTRIBUTING", "CHANGELOG"])]
    for caption, entries in contents:
        home += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n" + "\n".join(entries) + "\n```\n"
    (folder / "index.md").write_text(home, encoding="utf-8")


class _Links(html.parser.HTMLParser):
    """Gather the links and the anchors of a page."""

    def __init__(self):
        super().__init__()
        self.links, self.anchors = [], set()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def dead_links(site: Path) -> list[str]:
    """Return every link within a site that leads nowhere, as `page: link`."""
    pages = {}
    for path in (path for path in site.rglob("*.html") if "_static" not in path.parts):  # where themes keep templates
        pages[path.resolve()] = parser = _Links()
        parser.feed(path.read_text(encoding="utf-8"))
    dead = []
    for path, parser in pages.items():
        for link in parser.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (parts.fragment and target in pages and urllib.parse.unquote(parts.fragment)
                                       not in pages[target].anchors | {""}):
                dead.append(f"{path.relative_to(site)}: {link}")
    return sorted(set(dead))


def main() -> int:
    """Make the site; a warning or a dead link is an error."""
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "site")  # MyST-NB writes beside the site, too
        source.mkdir()
        write_source(source)
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(source), str(made)]
        done = subprocess.run(command)
        shutil.rmtree(OUT, ignore_errors=True)
        shutil.copytree(made, OUT, ignore=shutil.ignore_patterns(".doctrees"))
    dead = dead_links(OUT)
    print("\n".join(f"dead link in {link}" for link in dead) or f"open {(OUT / 'index.html').relative_to(ROOT)}")
    return done.returncode or bool(dead)


if __name__ == "__main__":
    sys.exit(main())
