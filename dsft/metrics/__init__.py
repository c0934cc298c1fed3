"""What is recorded while training, and where it goes."""
