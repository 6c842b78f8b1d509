"""Faults, tried in large numbers: laws, damaged files, killed runs, other numbers of processes. `campaign` runs them."""
