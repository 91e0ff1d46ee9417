"""Training: settings and recipes, the optimizer, and the run itself."""
