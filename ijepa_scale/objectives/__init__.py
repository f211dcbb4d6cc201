"""What a prediction is compared with, and how."""
