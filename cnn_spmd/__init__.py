"""AlexNet and its relatives on a (data, model) device mesh. Read sharding/table.py, models/alexnet.py,
training/step.py, training/loop.py, in that order.
"""
