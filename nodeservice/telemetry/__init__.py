"""What the node says about itself: logs, traces and metrics."""
