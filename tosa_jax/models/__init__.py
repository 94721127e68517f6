"""Vision transformers whose layers come in kinds."""
