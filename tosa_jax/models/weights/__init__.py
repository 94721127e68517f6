"""Released weights into a model, and a model's weights out: file formats, names, checks.
What a network looks like is in `models`; checkpoints of training runs are in `train.checkpoints`.
"""
