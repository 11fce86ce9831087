"""What stands around the training loop of train.py. Nothing here changes a gradient."""
