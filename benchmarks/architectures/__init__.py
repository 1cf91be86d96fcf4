"""The family side by side: architectures, memories and ablations on the same text and budget."""
