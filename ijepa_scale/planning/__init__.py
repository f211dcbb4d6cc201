"""What a run needs and how fast it can be: sizes, FLOPs, memory, hardware peaks. Floor 1: builds no module."""
