"""Make README.md from nbs/index.ipynb with `make readme` (nbdev_readme needs quarto, which cannot be assumed)."""

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^)"\s]+)')


def relink(text: str) -> str:
    """Point relative links, which a notebook means from nbs/, at the same files from the repository root."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)  # every second part is a code block
    parts[::2] = [LINK.sub(lambda m: m[1] + posixpath.normpath(f"nbs/{m[2]}"), part) for part in parts[::2]]
    return "".join(parts)


def show_output(output: dict) -> str:
    """Return one stored output as Markdown; an image belongs in nbs/images and a Markdown cell, so it gives nothing."""
    data = output.get("data", {})
    if "text/markdown" in data:
        return relink("".join(data["text/markdown"]).strip())
    text = "" if any(kind.startswith("image/") for kind in data) else "".join(data.get("text/plain", ""))
    text = (text or "".join(output.get("text", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def show_cell(cell: dict) -> list[str]:
    """Return one cell as Markdown blocks; `#| hide` drops the cell and `#| echo: false` its source."""
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [relink(source)]
    directives = re.findall(r"^#\|\s*(.+?)\s*$", source, flags=re.MULTILINE)
    if cell["cell_type"] != "code" or "hide" in directives:
        return []
    code = "" if "echo: false" in directives else re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
    return [f"```python\n{code}\n```" if code else "", *map(show_output, cell.get("outputs", []))]


def make_readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    """Return the text of README.md."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    blocks = ["<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->"]
    blocks += [block for cell in cells for block in show_cell(cell) if block]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(make_readme(), encoding="utf-8")
