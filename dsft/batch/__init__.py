"""From packs to tensors, ahead of the step that needs them."""
