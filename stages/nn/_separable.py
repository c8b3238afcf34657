"""When a depthwise convolution and the 1x1 convolution after it are better computed as one dense convolution."""

_WORTH = 4.0


def dense_is_quicker(inputs: int, outputs: int, kernels: int, area: int) -> bool:
    """C, M, G = sum g_c, K^2: whether forward and backward pass together are quicker as one dense convolution.

    True where the dense form has at most 4 times the multiply-accumulates, M C K^2 <= 4 G (K^2 + M). Depthwise
    backward passes, and the gather of repeated channels before them, make up for that much; `python -m
    benchmarks.separable` prints the times on which the bound rests. Without gradients the separable form is quicker.
    """
    return outputs * inputs * area <= _WORTH * kernels * (area + outputs)
