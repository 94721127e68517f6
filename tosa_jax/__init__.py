"""Token Selective Attention (ToSA) for vision transformers in JAX."""
