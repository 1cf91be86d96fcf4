"""Measurements. Each folder has a command that makes its results again."""
