"""Models to start from: see docs/own-model.md."""
