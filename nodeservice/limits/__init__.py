"""Limits of a task: planned, held by the kernel, read back, proven."""
