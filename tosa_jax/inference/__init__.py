"""Predictions of trained models: loading a model with its preprocessing, and `Predictor`.
Training and evaluation on data sets are in `train`.
"""
