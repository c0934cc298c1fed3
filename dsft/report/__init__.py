"""What a run did and whether it worked, on one page."""
