"""One module per step. A step acts through the ports, may be run twice, and returns the event that tells how it went."""
