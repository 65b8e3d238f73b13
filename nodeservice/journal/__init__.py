"""Durable memory of attempts."""
