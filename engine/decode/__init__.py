"""Token ids in, token ids out: cache of the beginning, the step, the recorded graph, the draw."""
