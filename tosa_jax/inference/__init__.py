"""A trained network at work: loading one with all that belongs to it, and `Predictor`.
Training and evaluation on data sets are in `train`.
"""
