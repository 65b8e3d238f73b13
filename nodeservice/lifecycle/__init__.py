"""Drives attempts through their life: journals each step of the pure core, then acts through the ports."""
