"""How good the features are. Floor 4."""
