"""The parts of `make demo-gpu`: the pretended machines, the batch, what is seen of it, and the checks."""
