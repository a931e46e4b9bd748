"""Single passes over many numbers, compiled where there is a C compiler, and the same in torch."""
