"""What a run is asked to do: the YAML's models, the DeepSpeed JSON merge, hostfiles. Imports no torch."""
