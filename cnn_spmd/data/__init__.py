"""Data sets as arrays on the host, the order of their examples, and the batches made of them on the devices."""
