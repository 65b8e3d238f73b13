"""What the benchmarks share: the machine, numbers with their spread, a whole service, and what it is compared with."""
