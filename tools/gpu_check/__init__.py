"""What tools/test_gpu.py checks on a machine with a real NVIDIA GPU, one module a subject."""
