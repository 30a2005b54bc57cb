"""Two functions whose lines are printed in golden texts: the numbers of these lines are part of
the texts."""

import torch


def waves(x):
    y = torch.sin(x)
    y = y * y
    return y.sum()


def written(x):
    y = x.clone()
    y[0] = 1
    return y
