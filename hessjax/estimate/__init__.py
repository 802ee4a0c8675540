"""From an operator to densities, traces, diagonals and counts: every number with its error."""
