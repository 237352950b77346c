"""Messages in, events out: templates, tokens, reasoning, one turn, the engine itself."""
