"""Options: their types, their checks, and reading them from YAML and the command line. Imports no torch."""
