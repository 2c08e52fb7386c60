"""What is wrong with the initialization of a model, in sentences, with the line that mends it."""
