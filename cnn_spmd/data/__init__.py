"""Load data sets on the host, order their examples, and bring them to devices."""
