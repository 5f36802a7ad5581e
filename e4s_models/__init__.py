"""Networks in plain PyTorch, one per file, the region labels and the weights registry."""
