"""Pruning: methods by name, scores of weights, and the masks that scores or shapes turn into."""
