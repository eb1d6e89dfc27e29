"""Grids: many runs described in one YAML file, and how far each has come."""
