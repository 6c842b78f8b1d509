"""What all benchmarks share: records of what was measured, pages made from them, sides timed in turns, one command line."""
