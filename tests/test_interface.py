"""The public names and their parameters: other people's code calls them, so a change has to be one that was meant."""

import importlib
import inspect
import os
import re
from pathlib import Path

import pytest

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


def module_names() -> list[str]:
    """Return every module and package below `attn_cifar`, by its dotted name."""
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")
             if path.name == "__init__.py" or not path.name.startswith("_")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths} - {"attn_cifar"}
    return sorted(names)


def interface() -> list[str]:
    """Return a line for each public name of each module, and for each public method."""
    lines = []
    for module in map(importlib.import_module, module_names()):
        place = module.__name__.removeprefix("attn_cifar.")
        if module.__file__.endswith("__init__.py"):  # names of other modules, whose parameters stand there
            lines += [f"{place}: {name}" for name in sorted(module.__all__)]
            continue
        for name in sorted(getattr(module, "__all__", [])):
            thing = getattr(module, name)
            shown = signature(thing) if callable(thing) else f": {type(thing).__name__}"
            lines.append(f"{place}.{name}{shown}")
            if inspect.isclass(thing):
                lines += [f"{place}.{name}.{method}{signature(function)}" for method, function in sorted(vars(thing).items())
                          if inspect.isfunction(function) and not method.startswith("_")]
    return lines


def test_the_interface_is_the_one_that_is_written_down():
    """`ATTN_CIFAR_WRITE_INTERFACE=1 pytest tests/test_interface.py` writes it anew, for a change that was meant."""
    if os.environ.get("ATTN_CIFAR_WRITE_INTERFACE"):
        STORED.write_text("\n".join(interface()) + "\n", encoding="utf-8")
    written, found = STORED.read_text(encoding="utf-8").splitlines(), interface()
    gone, new = sorted(set(written) - set(found)), sorted(set(found) - set(written))
    assert written == found, f"gone or changed: {gone}; new: {new}"


def test_every_notebook_that_exports_was_visited():
    """A folder that the search overlooks would make the test above pass without looking."""
    notebooks = (PACKAGE.parent / "nbs").rglob("*.ipynb")
    line = re.compile(r"#\|\s*default_exp ([\w.]+)")
    exported = {name for path in notebooks for name in line.findall(path.read_text(encoding="utf-8"))}
    assert len(exported) > 50
    visited = {name.removeprefix("attn_cifar.") for name in module_names()}
    assert visited == {name.removesuffix(".__init__") for name in exported} | {"faithfulness", "runs"}


def test_a_name_that_is_removed_is_noticed(monkeypatch):
    """A planted fault: a package that no longer exposes one of its names, and a module that lost a function."""
    before = interface()
    data, blocks = importlib.import_module("attn_cifar.data"), importlib.import_module("attn_cifar.models.blocks")
    monkeypatch.setattr(data, "__all__", [name for name in data.__all__ if name != "load_data"])
    assert set(before) - set(interface()) == {"data: load_data"}
    monkeypatch.setattr(blocks, "__all__", [name for name in blocks.__all__ if name != "conv_block"])
    assert {line.split("(")[0] for line in set(before) - set(interface())} == {"data: load_data",
                                                                              "models.blocks.conv_block"}


# What README, CHANGELOG and the quickstart of 0.1.0 import, by module.
NAMES_OF_0_1_0 = {
    "app": "Classifier answer explain_images load_classifier make_app run_app",
    "data": "AlbumentationsTransform Augmentation Batches ImageData ImageDataset InputError NO_AUGMENTATION SHAPE_NAMES "
            "albumentations_pipeline cache_folder draw_shapes load_data map_array normalize read_image unnormalize",
    "explain": "Explanation METHODS convolution_layers explain prepare_images",
    "faithfulness": "Faithfulness blurred check_explanations rank_correlation score_maps shuffled_weights",
    "lr_finder": "LRRangeTest Stepper endless find_lr fit_with_suggestion move read_curve smooth sweep",
    "lr_finder_compat": "DataLoaderIter LRFinder TrainDataLoaderIter ValDataLoaderIter",
    "models": "BasicAttention HybridAttention MODELS ModelEntry SpatialAttention SpeedAttention Ultimus count_macs "
              "count_parameters create_model describe_model find_pretrained list_models load_pretrained record_attention",
    "report": "make_report SECTIONS choose_explained",
    "runs": "Evaluation Run describe_machine evaluate load_results load_run read_config refuse_other_run",
    "s9": "Alb_trans GRADCAM LRRangeFinder S9_CIFAR10_data_prep Ultimus basic_attn_model cifar10_plots counters "
          "create_tensorboard_writer ctr plot_onecyclelr_curve s9_run_main stats_collector test_losses train_losses",
    "studies": "STUDIES load_results run_study summarize_run",
    "training": "BatchLoss CHECKPOINT Engine Evaluation RECIPES Recipe Run autocast check_output choose_engine choose_recipe "
                "evaluate fit keep_memory load_run make_optimizer make_scheduler",
    "visualization": "plot_confusion plot_explanations plot_history plot_images plot_lr_find plot_misclassified plot_network "
                     "plot_schedule",
}


@pytest.mark.parametrize("module", NAMES_OF_0_1_0)
def test_scripts_written_for_0_1_0_find_their_names(module):
    found = importlib.import_module(f"attn_cifar.{module}")
    assert not [name for name in NAMES_OF_0_1_0[module].split() if not hasattr(found, name)]
