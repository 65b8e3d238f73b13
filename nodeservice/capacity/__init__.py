"""What this host has, what of it can be used from here, and how busy it is."""
