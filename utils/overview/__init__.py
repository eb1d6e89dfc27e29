"""An overview of saved runs: where each of them stands, and in which options two of them differ."""
