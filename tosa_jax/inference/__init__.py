"""Predictions of trained models: loading a model with its preprocessing, `Predictor`, and programs that run elsewhere.
Training and evaluation on data sets are in `train`.
"""
