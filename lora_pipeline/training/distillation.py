"""Gates of a blend, learnt: on each concept's prompts the blend should predict what that adapter predicts alone.

ZipLoRA (Shah et al. 2023, arXiv:2311.13600) without its full matrices: a gate for each input column of an adapter's
`down` is a diagonal between the input and the factors, so that the result is a LoRA of the ranks' sum. Coarser gates,
one a block or one an adapter, are the same with equal columns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_pipeline.injection.inject import injected_layers, set_weights
from lora_pipeline.injection.layers import InjectedLayer
from lora_pipeline.pretrained.components import Components
from lora_pipeline.pretrained.denoising import Denoiser
from lora_pipeline.pretrained.encoding import encode_prompts
from lora_pipeline.training.draws import batch_indices
from lora_pipeline.training.trajectories import Moment

Gates = dict[tuple[str, Hashable], nn.Parameter]
Report = Callable[[int, float], None]


def column_gates(model: nn.Module, weights: Mapping[str, float]) -> Gates:
    """A gate an input column, by adapter and target, at the given weights."""
    return {
        (name, layer.target): nn.Parameter(torch.full(branch.down.shape[1:2], weights[name]))
        for layer in injected_layers(model)
        for name, branch in layer.branches.items()
    }


def group_gates(model: nn.Module, weights: Mapping[str, float], group: Callable[[str], Hashable]) -> Gates:
    """A gate for each adapter in each group of layers, at the given weights."""
    groups = {(name, group(layer.target)) for layer in injected_layers(model) for name in layer.branches}
    return {key: nn.Parameter(torch.tensor(weights[key[0]])) for key in sorted(groups, key=str)}


@contextmanager
def gated(model: nn.Module, gates: Gates, group: Callable[[str], Hashable]) -> Iterator[None]:
    """Inside, the gates multiply the adapters' changes, and gradients reach them."""

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, InjectedLayer)
        for name, branch in layer.branches.items():
            gate = gates[name, group(layer.target)]
            down = branch.down * (gate.reshape(-1, *[1] * (branch.down.ndim - 2)) if gate.ndim else gate)
            output = output + layer.product(inputs[0], down, branch.up) * (branch.alpha / branch.down.shape[0])
        return output

    layers = list(injected_layers(model))
    before = [{name: branch.weight for name, branch in layer.branches.items()} for layer in layers]
    handles = [layer.register_forward_hook(add) for layer in layers]
    set_weights(model, lambda *_: 0.0)
    try:
        yield
    finally:
        for handle, layer, weights in zip(handles, layers, before, strict=True):
            handle.remove()
            for name, weight in weights.items():
                layer.branches[name].weight = weight


def distil(  # noqa: PLR0913 - everything that decides the gates
    components: Components,
    moments: Sequence[Moment],
    gates: Gates,
    group: Callable[[str], Hashable],
    *,
    steps: int,
    learning_rate: float,
    overlap: float,
    seed: int,
    report: Report,
) -> list[float]:
    """Trains gates in place, by Adam; each step sees one moment of every scene.

    Args:
        components: With all adapters attached, those of the text encoder at the weights they will have.
        moments: Of all scenes, with the predictions to match.
        gates: See `column_gates` and `group_gates`.
        group: The gates' group of a target.
        steps: Of the optimiser.
        learning_rate: Of the gates, which are around 1.
        overlap: Weight of the mean |cosine| between two adapters' column gates, which keeps them apart.
        seed: Decides the order of moments.
        report: Is told the steps done and the loss.

    Returns:
        The loss before each step, without the overlap.
    """
    names = sorted({moment.scene for moment in moments})
    pools = {name: [moment for moment in moments if moment.scene == name] for name in names}
    with torch.no_grad():
        states = {prompts: encode_prompts(components, prompts) for prompts in {tuple(m.prompts) for m in moments}}
    denoise = Denoiser(components)
    optimiser = torch.optim.Adam(gates.values(), lr=learning_rate)
    losses = []
    with gated(components.unet, gates, group):
        for step in range(steps):
            optimiser.zero_grad()
            total = 0.0
            for name in names:
                [index] = batch_indices(len(pools[name]), 1, step, seed, "blend", name)
                moment = pools[name][index]
                student = denoise(moment.latents, moment.timestep, states[tuple(moment.prompts)])
                loss = F.mse_loss(student, moment.prediction)
                loss.backward()
                total += float(loss.detach())
            if overlap and (apart := overlaps(gates)) is not None:
                (overlap * apart).backward()
            optimiser.step()
            losses.append(total)
            report(step + 1, total)
    return losses


def overlaps(gates: Gates) -> Tensor | None:
    """The mean |cosine| between the column gates that different adapters have in one layer; None if there are none."""
    by_layer: dict[Hashable, list[Tensor]] = {}
    for (_, target), gate in gates.items():
        if gate.ndim:
            by_layer.setdefault(target, []).append(gate)
    cosines = [
        F.cosine_similarity(one, other, dim=0).abs()
        for each in by_layer.values()
        for index, one in enumerate(each)
        for other in each[index + 1 :]
    ]
    return torch.stack(cosines).mean() if cosines else None
