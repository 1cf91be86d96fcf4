"""TensorRT: the memory rule as one kernel, the plugin around it, engines, and what a graph becomes there."""
