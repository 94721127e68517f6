"""What a network is trained for: its inputs, its losses, its metrics."""
