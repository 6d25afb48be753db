"""Draw README's picture, nbs/images/overview.png, from stored results and a folder of CIFAR-10: `make picture DATA=folder`."""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from attn_cifar.data import load_data, normalize
from attn_cifar.explain import explain
from attn_cifar.models import load_pretrained
from attn_cifar.studies import load_results
from attn_cifar.visualization import COLORS, STYLE, overlay

ROOT = Path(__file__).resolve().parent.parent
SHOWN = "cat", "horse", "frog", "ship"  # the first test image of each


def accuracies() -> dict[str, float]:
    """Return the mean test accuracy of each network within upstream's parameters, in percent."""
    runs = load_results("reproduction")["runs"]
    found = {"upstream's report": 38.53}
    for name in ("basic_attn", "spatial_attn"):
        found[name] = 100 * np.mean([run["test_accuracy"] for run in runs if run["model"] == name])
    for name in ("conv_tiny", "attn_tiny"):
        found[name] = 100 * np.mean([row["accuracy"] for row in load_results("ladder")["final"] if row["name"] == name])
    return found


def draw(source: str) -> None:
    """Draw accuracies on the left, and what attn_tiny looks at on the right."""
    data, model = load_data(source), load_pretrained("attn_tiny")
    chosen = [int(np.flatnonzero(data.test_labels == data.class_names.index(name))[0]) for name in SHOWN]
    pixels = np.array(data.test_images[chosen])
    grad_cam = explain(model, normalize(torch.from_numpy(pixels), data.mean, data.std), methods=("grad_cam",))[-1]
    heat = grad_cam.upsampled(32).numpy()
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.7), dpi=110, layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
        ax = left.subplots()
        bars = accuracies()
        notes = {"upstream's report": "attention over one pooled vector", "basic_attn": "the network as described, our training",
                 "spatial_attn": "attention over 8×8 positions", "conv_tiny": "depthwise convolutions only",
                 "attn_tiny": "depthwise convolutions and attention"}
        place = np.arange(len(bars))[::-1]
        ax.barh(place, bars.values(), color=[COLORS["grey"]] + [COLORS["blue"]] * (len(bars) - 1), height=0.72)
        for y, value in zip(place, bars.values(), strict=True):
            ax.text(value - 1.5, y, f"{value:.1f} %", va="center", ha="right", color="white", fontsize=10, fontweight="bold")
        ax.set_yticks(place, [f"{name}\n{notes[name]}" for name in bars], fontsize=8.5)
        ax.set(xlim=(0, 100), xlabel="test accuracy [%]")
        ax.tick_params(length=0)
        ax.grid(axis="y", visible=False)
        for column, axes in enumerate(right.subplots(2, len(chosen)).T):
            name = data.class_names[int(grad_cam.targets[column])]
            axes[0].imshow(pixels[column])
            axes[0].set_title(f"{name}, {float(grad_cam.probabilities[column]):.0%}", fontsize=9.5, loc="center")
            axes[1].imshow(overlay(pixels[column] / 255, heat[column], bool(grad_cam.empty[column])))
            for ax, text in zip(axes, ("image", "Grad-CAM"), strict=True):
                ax.set(xticks=[], yticks=[], ylabel="" if column else text)
                ax.grid(False)
                ax.spines[:].set_visible(False)
        left.suptitle("Networks of at most 25,680 parameters", x=0.02, ha="left")
        right.suptitle("What attn_tiny says, and where it looks", x=0.05, ha="left")
        figure.savefig(ROOT / "nbs" / "images" / "overview.png")


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "cifar10")
