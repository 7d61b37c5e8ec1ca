"""Recursive Bayesian Pruning (Zhou et al. 2018, arXiv 1812.00353), with our own derivation.

The noise of a network is a Markov chain over its gates. The posterior of each gate is conditioned
on the gates before it, whose noise is a point mass: their units are pruned, and their means are
folded into the weights of the smaller network. `docs/rbp.md` has the derivation, and says which
parts of it the abstracts of the paper state.
"""

from __future__ import annotations

from pyro_sbp.gates.gate import Gate
from pyro_sbp.gates.probing import Gates
from pyro_sbp.methods.gated import GatedMethod
from pyro_sbp.methods.stage import Turn
from pyro_sbp.recipes.method_recipes import RBPRecipe

__all__ = ["RBP", "in_order"]


def in_order(gates: Gates) -> list[Gate]:
    """Gates in the order in which their noise enters the network.

    The noise of a gate is applied at the inputs of its readers. The position of a gate is therefore
    that of its reader that is called first. For example, a residual stream has the position of the
    first block that reads it. If two gates are at the same layer, the gate on channels comes before
    the gate on their flattened features.
    """
    place = {layer: index for index, layer in enumerate(gates.called)}

    def key(gate: Gate) -> tuple[int, bool]:
        return min(place[span.layer] for span in gate.readers), not gate.writers

    return sorted(gates, key=key)


class RBP(GatedMethod[RBPRecipe]):
    """Dense training, then a turn for each gate, then fine-tuning. Each turn trains the network of
    the turn before with noise on one gate, and prunes this gate.
    """

    reopens = False

    def turns(self) -> list[Turn]:
        recipe = self.recipe
        names = [gate.name for gate in in_order(self.gates)]
        if recipe.order == "together":
            return [Turn("gated", tuple(names), recipe.epochs)]
        if recipe.epochs < len(names):
            raise ValueError(
                f"epochs is {recipe.epochs}, but there are {len(names)} gates: rbp needs at "
                "least one epoch per gate"
            )
        each, more = divmod(recipe.epochs, len(names))
        if recipe.order == "reversed":
            names.reverse()
        return [
            Turn(f"gate {name}", (name,), each + (index < more)) for index, name in enumerate(names)
        ]
