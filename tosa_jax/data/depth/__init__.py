"""Images with depth maps: how they are decoded, checked and augmented.
The builders of depth sets are in `data.builders`, the depth task is in `tasks`.
"""
