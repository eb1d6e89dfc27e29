"""A run on disk and in time: its directory, tables, weights, resume states and levels."""
