"""What torch has no fast form for: attention over live rows, kernels for a GPU."""
