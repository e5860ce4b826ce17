"""What runs artifacts on a GPU."""
