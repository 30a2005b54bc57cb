"""Programs in, programs out: the transforms and the local rewritings."""
