"""A model's tensors as nodes of a hash-consed graph in a normal form."""
