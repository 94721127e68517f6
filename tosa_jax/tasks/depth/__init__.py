"""Monocular depth: the task, its decoder, and what predict prints. Depth maps as data are read in `data`."""
