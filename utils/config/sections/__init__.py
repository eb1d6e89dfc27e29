"""The options, one file per section of a config: what each takes, default, unit, meaning, role."""
