"""The sources that images are read from, and how their samples are listed."""
