"""Training data of dictionaries, as resumable streams of batches."""
