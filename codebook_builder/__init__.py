"""The offline half: probe experiments, prototype selection, codebook writing, the `codebook-build` command line."""
