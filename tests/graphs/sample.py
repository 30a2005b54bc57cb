"""Two functions whose lines are printed in golden texts, with the numbers of these lines."""

import torch


def waves(x):
    y = torch.sin(x)
    y = y * y
    return y.sum()


def written(x):
    y = x.clone()
    y[0] = 1
    return y
