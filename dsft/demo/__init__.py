"""The embedded demonstration: corpus from the Python installation, tokenizer, run, summary."""
