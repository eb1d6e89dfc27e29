"""Analyses of finished runs and checkpoints."""
