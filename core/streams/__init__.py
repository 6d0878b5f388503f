"""What a dictionary is trained on, as streams of batches that can be resumed."""
