"""What is asked of finished runs: masks, signs, connected networks, cost, sharpness."""
