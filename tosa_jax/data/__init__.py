"""Everything about the data: builders, host transforms, device-side mixing, and the pipeline."""
