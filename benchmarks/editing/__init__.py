"""Whether editing helps, and what the manifest recommends."""
