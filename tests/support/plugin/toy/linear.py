"""A form from outside the package, its module: a weight [O, I] that is 0 but for w[o, o mod I]."""

import torch
from torch import nn
from torch.nn.functional import linear

from orchestrator.models.forms.base import FormLinear, FormTensor


class DiagonalLinear(FormLinear):
    """Multiplies output o with input o mod I."""

    form = "diagonal"
    fields = ()

    def __init__(self, in_features, out_features, *, bias, device, dtype):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        bias_O = torch.empty(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias_O) if bias else None)

    @classmethod
    def make(cls, stored, in_features, out_features, *, shares_basis, **options):
        return cls(in_features, out_features, **options)

    @classmethod
    def tensors(cls, stored, out_features, in_features):
        return (FormTensor(name="weight", part="diagonal", shape=(out_features,)),)

    @classmethod
    def misfit(cls, stored, out_features, in_features):
        return "" if in_features > 1 else "found diagonal, a linear of one input stays dense"

    def forward(self, input):
        return linear(input, self.dense_weight(), self.bias)

    def dense_weight(self):
        rows_O = torch.arange(self.out_features, device=self.weight.device)
        weight_OI = self.weight.new_zeros(self.out_features, self.in_features)
        return weight_OI.index_put((rows_O, rows_O % self.in_features), self.weight)
