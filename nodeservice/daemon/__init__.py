"""The composition root: the only place that names concrete adapters."""

from nodeservice.daemon.look import Seen, look
from nodeservice.daemon.node import Node, build, working
from nodeservice.daemon.serving import serve
from nodeservice.daemon.settings import open_store

__all__ = ["Node", "Seen", "build", "look", "open_store", "serve", "working"]
