"""The public names and their parameters: other people's code calls them, so a change has to be one that was meant."""

import importlib
import inspect
import os
from pathlib import Path

STORED = Path(__file__).parent / "interface.txt"
PACKAGE = Path(importlib.import_module("attn_cifar").__file__).parent


def signature(thing: object) -> str:
    """Return the parameters of a callable, with their defaults, as far as they are plain values."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return ""
    plain = (bool, int, float, str, type(None))
    words = []
    for parameter in parameters:
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}" if isinstance(
            parameter.default, plain) else "=…"
        words.append(star + parameter.name + default)
    return f"({', '.join(words)})"


def interface() -> list[str]:
    """Return a line for each public name of each module, and for each public method."""
    lines = []
    for path in sorted(PACKAGE.glob("[a-z]*.py")):
        module = importlib.import_module(f"attn_cifar.{path.stem}")
        for name in sorted(getattr(module, "__all__", [])):
            thing = getattr(module, name)
            shown = signature(thing) if callable(thing) else f": {type(thing).__name__}"
            lines.append(f"{path.stem}.{name}{shown}")
            if inspect.isclass(thing):
                lines += [f"{path.stem}.{name}.{method}{signature(function)}" for method, function in sorted(vars(thing).items())
                          if inspect.isfunction(function) and not method.startswith("_")]
    return lines


def test_the_interface_is_the_one_that_is_written_down():
    """`ATTN_CIFAR_WRITE_INTERFACE=1 pytest tests/test_interface.py` writes it anew, for a change that was meant."""
    if os.environ.get("ATTN_CIFAR_WRITE_INTERFACE"):
        STORED.write_text("\n".join(interface()) + "\n", encoding="utf-8")
    written, found = STORED.read_text(encoding="utf-8").splitlines(), interface()
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    assert written == found, f"gone or changed: {gone}; new: {new}"
