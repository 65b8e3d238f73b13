"""Collecting what a task wrote, and the stores that make it durable."""
