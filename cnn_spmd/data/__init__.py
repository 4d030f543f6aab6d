"""Data sets as arrays (sources.py, cifar10.py) and the batches cut from them."""
