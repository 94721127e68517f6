"""The data: TFDS builders, decoding, augmentation on the host, and the pipeline that makes batches.

What happens to a batch on the device (mixing, normalisation) is in `tasks`.
"""
