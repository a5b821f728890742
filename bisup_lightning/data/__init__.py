"""Text, the two streams of hidden states, and batches of one block."""
