"""The composition root: the only place that names concrete adapters.

Nothing is imported here: `inspect` is a look at the host, and does not wait for all that a node is made of.
"""
