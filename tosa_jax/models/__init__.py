"""Vision transformers whose layers come in kinds: sizes, layers, plans, the networks, what they cost.

How they are trained is in `train`, what they are trained for in `tasks`.
"""
