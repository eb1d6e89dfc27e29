"""Training one network: the step, the hardware it runs on, and gradients between processes."""
