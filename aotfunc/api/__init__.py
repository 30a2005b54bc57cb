"""The functions as users call them: trees in, trees out."""
