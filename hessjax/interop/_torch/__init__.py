"""PyTorch's models as JAX functions: its exported graphs, read by a table of rules, one per ATen operation."""
