"""Pictures of what an encoder has learned, and the HTML report of runs."""
