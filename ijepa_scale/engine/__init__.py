"""Ways of spreading a training step over processes, behind one protocol."""
