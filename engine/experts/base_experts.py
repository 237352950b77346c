"""The base expert of every layer: what stands in for a missing one without a byte (ResMoE, MEO), where the experts of
the model have a part in common (engine/policies/barycenter.py). It is made when the policy is chosen and stays near.
"""
from __future__ import annotations

import torch

from engine.core import UserError
from engine.experts.layer import LayerExperts
from engine.experts.runtime import Runtime
from engine.policies.barycenter import Common, common_part

Tensor = torch.Tensor


class BaseExperts:
    """bytes: of all, in float32. UserError for a model whose experts have no part in common, or biases."""

    def __init__(self, runtime: Runtime) -> None:
        far = runtime.far
        if any(layer.biases for layer in runtime.layers):
            raise UserError("The experts of this model have biases, for which no base expert is made; choose another "
                            "fidelity.")
        self._matrices = []
        for layer in runtime.layers:
            common = common_of(runtime, layer.index)
            if not common.is_there:
                raise UserError(f"The experts of this model have no part in common that could stand in for them: "
                                f"{common.unexplained:.0%} of them is each one's own in layer {layer.index}; choose "
                                "another fidelity.")
            gate, up, down = common.base.view(far.neurons, 3, far.hidden).unbind(1)
            self._matrices.append((layer.join(gate.T, up.T).T.contiguous(), down.contiguous()))
        self.bytes = sum(matrix.nbytes for pair in self._matrices for matrix in pair)

    def of(self, layer: LayerExperts, x: Tensor) -> Tensor:
        """x [T, H] -> what the layer's base expert gives, float32 [T, H], before a router's weight."""
        return layer.whole(x.float(), *self._matrices[layer.index], 0)


def common_of(runtime: Runtime, layer: int) -> Common:
    """What a layer's experts have in common; the numbers of a neuron are its rows of gate, up and down."""
    far = runtime.far

    def neurons(expert: int) -> Tensor:
        made = torch.empty(far.neurons, 3, far.hidden)
        far.decode(layer, expert, *made.unbind(1))
        return made.flatten(1)
    return common_part(neurons, far.experts)
