"""The wire side of the node: the gRPC server, the way to the master, conversions and credentials."""
