"""The model side: plain PyTorch that knows nothing of Ray, Optuna or YAML."""
