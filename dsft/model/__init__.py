"""The model: loading, packed attention, the masked head, and the proofs that it keeps dsft's promises."""
