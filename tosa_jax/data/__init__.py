"""Data sets: how they are prepared and opened, decoded and augmented on the host, and put into batches.
What happens to a batch on the device (mixing, normalisation) is in `tasks`.
"""
