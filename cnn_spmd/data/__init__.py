"""Data sets as arrays on the host, the order of their examples, and their way to the devices."""
