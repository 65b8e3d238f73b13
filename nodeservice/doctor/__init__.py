"""Proves on this very machine which limits hold: small containers try to break them, on the path that every task takes."""
