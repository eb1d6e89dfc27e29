"""Pruning methods by name, without torch."""

# The names in CRITERIA of utils/pruning_utils.py, whose import would bring torch.
METHODS = ("mag", "snip", "synflow", "grasp", "random", "random_erk", "random_balanced", "er_erk", "er_balanced")


NO_METHOD = "just dont"
