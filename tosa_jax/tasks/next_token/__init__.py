"""Object recognition as next-token prediction: a decoder reads the image's tokens and writes its labels as text."""
