"""Pictures that are drawn: rooms with exact depth, cluttered canvases.
The TFDS builders that store them are in `data.builders`.
"""
