"""AlexNet and its relatives on a (data, model) device mesh. Read placement.py, step.py, train.py, in that order."""
