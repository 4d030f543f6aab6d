"""Data sets on the host, the order of their examples, and the way to devices."""
