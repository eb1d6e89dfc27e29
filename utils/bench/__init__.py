"""Contenders and figures of `python -m utils.benchmark`."""
