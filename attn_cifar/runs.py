"""Kept for code written for 0.1.0: these names are in `attn_cifar.training`, `load_results` in `attn_cifar.studies`."""

from attn_cifar.studies.results import load_results as load_results
from attn_cifar.training import (
    Evaluation as Evaluation, Run as Run, describe_machine as describe_machine, evaluate as evaluate, load_run as load_run,
    read_config as read_config, refuse_other_run as refuse_other_run)
