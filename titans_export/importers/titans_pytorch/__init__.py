"""Models trained with titans-pytorch: their mathematics, without that library."""
