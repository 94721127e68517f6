"""Self-distillation without labels: DINO, and DenseDINO with its reference tokens."""
