"""Transform programs: derivatives, batching and local rewritings, from programs to programs."""
