"""What a network costs: timed beside rivals, and compiled for devices that are not there.
Arithmetic of multiply-adds is in `models.cost`; profiles of a training run are in `train`.
"""
