"""Native kernels: schemas, reference implementations, loading of the compiled library, public functions."""
