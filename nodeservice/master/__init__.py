"""The reference master: a durable queue, placement over several nodes, results. It sees nodes only through the wire."""
