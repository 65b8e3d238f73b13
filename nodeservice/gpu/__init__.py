"""NVIDIA GPUs as the driver knows them."""
