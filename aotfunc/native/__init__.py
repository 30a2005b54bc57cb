"""Native code: C++ that is compiled, kept on disk, and called from Python."""
