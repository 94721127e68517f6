"""Loads released weights into models and saves models' weights: file formats, parameter names, checks.
What models look like is in `models`; checkpoints of training runs are written by `train.checkpoints`.
"""
