"""Weight-decomposed low-rank adaptation (Liu et al., "DoRA", ICML 2024, equation 5): m ⊙ V / ‖V‖, V = W + s · B A.

‖V‖ is the norm of what each output weighs, m starts as that of W. For the gradient ‖V‖ is a constant (section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vpt.backbones.factory import Backbone
from vpt.deltas.low_rank.lora import Lora
from vpt.deltas.registry import register_delta


@register_delta("dora")
class Dora(Lora):
    """LoRA of the direction of what each output weighs, and a trained length of it: `magnitude` m, (outputs,).

    Its strength α interpolates the weight, W + α (m ⊙ V / ‖V‖ − W). An output whose weights are all 0 has no direction
    and stays as it is.
    """

    method = "DoRA"

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 8,
        scale: float | None = None,
        targets: Sequence[str] = ("q", "v"),
        layers: Sequence[int] | None = None,
    ) -> None:
        """Draws A as PyTorch draws a linear layer, sets B to zero and m to the norms of W; arguments are `Lora`'s."""
        super().__init__(backbone, rank, scale, targets, layers)
        weights = {key: t.module.weight[t.start : t.stop] for key, t in self.targets.items()}
        weights |= {key: layer.weight for key, layer in self.convolutions.items()}
        self.magnitude = nn.ParameterDict()
        for key, weight in weights.items():
            own = weight.detach().to(backbone.mean.dtype)
            self.magnitude[key] = nn.Parameter(torch.linalg.vector_norm(own.flatten(1), dim=1))

    def expected_parameters(self) -> int:
        """Σ rank · (inputs + outputs) + outputs over the maps."""
        return super().expected_parameters() + sum(outputs for outputs, _ in self.shapes.values())

    def lengths(self, module: nn.Linear, keys: Sequence[str]) -> Tensor:
        """The m of all outputs of a module, (outputs,); the norm of what one weighs that belongs to no map."""
        found: Tensor = torch.linalg.vector_norm(module.weight.detach().to(self.magnitude[keys[0]].dtype), dim=1)
        for key in keys:
            found[self.targets[key].start : self.targets[key].stop] = self.magnitude[key].detach()
        return found

    def _gain(self, key: str, weight: Tensor) -> Tensor:
        """What each output of a map, whose weights are given, is multiplied with: m / ‖V‖, (outputs,)."""
        down, up = self.factors(key)
        changed = weight.flatten(1).to(up.dtype) + (up * self.factor) @ down.flatten(1)
        norm = torch.linalg.vector_norm(changed, dim=1).detach()
        gain: Tensor = self.magnitude[key] / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return gain

    def _gains(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        """Those of all outputs of a module, (outputs, 1); 1 where none of its maps is."""
        gains = []
        for key in keys:
            target = self.targets[key]
            gain = self._gain(key, weight[target.start : target.stop]) - 1
            gains.append(pad(gain, (target.start, target.module.out_features - target.stop)))
        return sum(gains[1:], start=gains[0]).unsqueeze(1) + 1

    def _changed(self, keys: Sequence[str], weight: Tensor) -> Tensor:
        gains, (down, up) = self._gains(keys, weight), self._stacked(keys)
        return torch.addmm(weight * (1 + self.at(keys[0]) * (gains - 1)), gains * up, down)

    def _beside(self, keys: Sequence[str], module: nn.Linear, x: Tensor, out: Tensor) -> Tensor:
        gains, (down, up) = self._gains(keys, module.weight), self._stacked(keys)
        bare = out if module.bias is None else out - module.bias
        out = out + bare * (self.at(keys[0]) * (gains.squeeze(1) - 1))
        return torch.addmm(out.flatten(0, -2), x.flatten(0, -2) @ down.T, (gains * up).T).view_as(out)

    def _convolved(self, key: str, weight: Tensor) -> Tensor:
        if (strength := self.at(key)) == 0.0:
            return weight
        (down, up), gain = self.factors(key), self._gain(key, weight).unsqueeze(1)
        rows = weight.flatten(1) * (1 + strength * (gain - 1))
        return torch.addmm(rows, gain * up * (self.factor * strength), down.flatten(1)).view_as(weight)
