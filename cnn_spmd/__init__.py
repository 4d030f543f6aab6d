"""Train AlexNet and its relatives on a (data, model) device mesh.

Read sharding/table.py, models/alexnet.py, training/step.py and training/loop.py, in that order.
"""

__version__ = "0.1.0"
