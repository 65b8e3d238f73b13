"""nodeservice: a batch worker for (GPU) machines that a master can trust."""

__version__ = "0.1.0"
