"""The node's settings: one frozen value, read once at start."""

from nodeservice.config.layers import load_config
from nodeservice.config.settings import NodeConfig

__all__ = ["NodeConfig", "load_config"]
