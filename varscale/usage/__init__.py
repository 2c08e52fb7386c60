"""What a program does with each of its parameters, read off its jaxpr: no numbers, no moments."""
