"""Renderers of images: rooms with exact depth, and cluttered canvases.
The TFDS builders that store their images are in `data.builders`.
"""
