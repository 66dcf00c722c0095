"""`python -m f2llm` is `f2llm`: what torchrun starts on each rank."""

from f2llm.cli import main

main()
