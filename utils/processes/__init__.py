"""Processes: rank and launch, CPU cores, stop signals. Imports no torch."""
