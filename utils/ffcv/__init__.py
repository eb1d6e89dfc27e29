"""ImageNet from FFCV's .beton files: writing, decoding and batches."""
