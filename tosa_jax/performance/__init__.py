"""Benchmarks of models against baselines, and ahead-of-time compilation for other devices.
Multiply-adds by arithmetic are in `models.cost`; profiles of a training run are in `train`.
"""
