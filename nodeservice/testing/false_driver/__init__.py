"""A false NVIDIA driver: a libnvidia-ml.so.1 of our own beneath the real binding, to test and try things without a GPU.

It pretends: it proves our calls, and our handling of what a driver can say, not NVIDIA's behaviour. It follows nvml.h.
"""

from nodeservice.testing.false_driver.driver import FalseDriver
from nodeservice.testing.false_driver.machines import MACHINES, FalseGpu, FalseMig, Machine

__all__ = ["MACHINES", "FalseDriver", "FalseGpu", "FalseMig", "Machine"]
