"""What images can be read from, and how their samples are listed."""
