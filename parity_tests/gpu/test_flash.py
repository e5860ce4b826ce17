"""The FlashAttention-2 paths on a CPU, with a stand-in for the kernel."""
