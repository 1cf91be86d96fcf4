"""Does editing at test time generalise better? The source's tasks, every contestant at the same size."""
