"""What an element is worth (`criteria`) and what a block does for the task (`probes`), and their sums over an interval."""
