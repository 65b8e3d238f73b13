"""Runs containers: adapters of `ports.ContainerRuntime`."""
