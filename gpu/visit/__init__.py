"""The measurements of one visit to a machine with a GPU."""
