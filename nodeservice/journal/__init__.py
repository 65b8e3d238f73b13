"""Durable memory of attempts: `sqlite` for nodes, `memory` for tests and one-shot runs."""
