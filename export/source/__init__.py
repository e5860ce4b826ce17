"""What an export starts from: a checkpoint, checked and read."""
