"""A module whose functions and constants the tests of guards change."""

RATE = 0.5
TABLE = {"rate": 0.5, "deep": [1.0, {"x": 2.0}]}


def helper(x):
    return x * RATE


def through(x):
    return helper(x) + TABLE["deep"][1]["x"]
