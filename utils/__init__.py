"""Everything behind harness.py; README's "How it works" has the map."""
