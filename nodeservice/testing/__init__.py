"""Fakes and receivers that are shipped with the package, held to the same contract suites as the real adapters."""
