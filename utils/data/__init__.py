"""Data sets: what is known of them, their files, and the loaders that turn them into batches."""
