"""Pruning: the table of methods, scores of weights, and allocations that turn scores into masks."""
