"""Training runs: stages, the loop, pure steps, evaluation, optimizer, checkpoints, work directory, logs.
It knows no method and no task by name; what runs where is in `distributed`.
"""
