"""What is asked of finished runs: how masks agree, where signs change, whether networks are connected."""
