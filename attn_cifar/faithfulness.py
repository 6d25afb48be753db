"""Kept for code written for 0.1.0: these names are in `attn_cifar.explain`."""

from attn_cifar.explain.faithfulness import (
    Faithfulness as Faithfulness, blurred as blurred, check_explanations as check_explanations,
    rank_correlation as rank_correlation, score_maps as score_maps, shuffled_weights as shuffled_weights)
