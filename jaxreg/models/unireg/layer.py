"""The layer of UniReg's and SAME's U-Net."""

from typing import Literal

from flax import linen as nn

from jaxreg.nn import halved
from jaxreg.nn.conv import api
from jaxreg.nn.heads import SLOPE
from jaxreg.nn.layers import Weights, convolution, leaky
from jaxreg.typing import Image


class Layer(nn.Module):
    """Convolution, leaky ReLU of slope 0.2; N D H W inputs, or parts of it.

    Attributes:
      inputs: channels.
      outputs: channels.
      stride: 1, or 2 for half the resolution.
      shortcut: whether the input, averaged where there is a stride, is added before
        the ReLU; only if both widths agree.
      form: see `jaxreg.nn.conv.api`.
      folded: whether the input is, and without a stride the result; see `nn.halved`.
    """

    inputs: int
    outputs: int
    stride: Literal[1, 2] = 1
    shortcut: bool = False
    form: api.Form = "auto"
    folded: bool = False

    @nn.compact
    def __call__(self, x) -> Image:
        """Returns N D' H' W' outputs."""
        if self.folded:
            shape = (3, 3, 3, self.inputs, self.outputs)
            y = halved.convolved(x, *Weights(shape, name="conv")(), stride=self.stride)
        else:
            function = api.conv3 if self.stride == 1 else api.conv3_stride2
            y = convolution(function, self.inputs, self.outputs, "conv", self.form)(x)
        if self.shortcut and self.inputs == self.outputs:
            y = y + (x if self.stride == 1 else api.average_pool2(x))
        return leaky(y, SLOPE)
