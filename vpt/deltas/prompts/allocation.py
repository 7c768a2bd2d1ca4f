"""Which layer a prompt moves to: a policy that learns from how the loss of training changed behind each move.

PRO-VPT (Shang et al., ICCV 2025) by proximal policy optimisation with a clipped surrogate (Schulman et al., "Proximal
policy optimization algorithms", 2017, equations 7 and 9), with the numbers of PRO-VPT's released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, one_hot

HIDDEN, CLIP, ROUNDS, ENTROPY, REWARDS = 64, 0.2, 60, 0.01, 2
"""Units of a layer, ε of the surrogate, steps of an update, weight of the entropy, rewards behind which it is made."""
ACTOR_RATE, CRITIC_RATE = 3e-4, 1e-3
"""Learning rates of Adam."""


def state_of(scores: Sequence[float], numbers: Sequence[int], layer: int) -> Tensor:
    """What the policy sees, (3 · layers,): scores, standardised, where the other prompts stand, and the prompt's layer.

    Args:
        scores: The sum of the scores of each layer's prompts.
        numbers: Of the prompts of each layer, two and more in all.
        layer: That of the prompt that moves.
    """
    own = one_hot(torch.tensor(layer), len(numbers)).double()
    idle, left = torch.tensor(scores, dtype=torch.float64), torch.tensor(numbers) - own
    return torch.cat([(idle - idle.mean()) / (idle.std(correction=0) + 1e-8), left / left.sum(), own])


class Policy:
    """An actor, which gives the logits of layers, and a critic, which expects a reward; both see `state_of`.

    On the CPU. All that is random follows from the generators that it is given.
    """

    def __init__(self, layers: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> None:
        """Draws the weights as PyTorch does, from U(-1/√width, 1/√width), and knows of no move."""
        self.actor, self.critic = (_network(3 * layers, outputs, generator, dtype) for outputs in (layers, 1))
        rates = ((self.actor, ACTOR_RATE), (self.critic, CRITIC_RATE))
        self.adam = torch.optim.Adam([{"params": [*network.parameters()], "lr": rate} for network, rate in rates])
        self.states, self.actions = list[Tensor](), list[int]()
        self.log_odds, self.expected, self.rewards = list[float](), list[float](), list[float]()

    @torch.no_grad()
    def choose(self, state: Tensor, generator: torch.Generator) -> int:
        """Draws the layer that a prompt moves to, and remembers the move until `learn`."""
        state = state.to(next(self.actor.parameters()).dtype)
        odds = self.actor(state).log_softmax(dim=0)
        layer = int(torch.multinomial(odds.exp(), 1, generator=generator))
        self.states.append(state)
        self.actions.append(layer)
        self.log_odds.append(float(odds[layer]))
        self.expected.append(float(self.critic(state)))
        return layer

    def learn(self, reward: float) -> None:
        """Takes the reward of the last move; behind every second one the networks learn from both moves."""
        self.rewards.append(reward)
        if len(self.rewards) == REWARDS:
            self._update()
            for kept in (self.states, self.actions, self.log_odds, self.expected, self.rewards):
                kept.clear()

    @torch.enable_grad()
    def _update(self) -> None:
        states, actions = torch.stack(self.states), torch.tensor(self.actions)
        before, expected, rewards = (states.new_tensor(own) for own in (self.log_odds, self.expected, self.rewards))
        returns = rewards.flip(0).cumsum(0).flip(0)  # undiscounted: each move is rewarded by what followed it
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        advantages = returns - expected
        for _ in range(ROUNDS):
            odds = self.actor(states).log_softmax(dim=1)
            ratios = (odds.gather(1, actions.unsqueeze(1)).squeeze(1) - before).exp()
            gained = torch.minimum(ratios * advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * advantages)
            entropy = -(odds.exp() * odds).sum(dim=1)
            loss = 0.5 * mse_loss(self.critic(states).squeeze(1), returns) - (gained + ENTROPY * entropy).mean()
            if bool(loss.isfinite()):
                self.adam.zero_grad()
                loss.backward()
                self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """All that it has learned and remembers, as plain values and tensors."""
        kept = {name: list(getattr(self, name)) for name in _REMEMBERED}
        return kept | {name: getattr(self, name).state_dict() for name in ("actor", "critic", "adam")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        for name in ("actor", "critic", "adam"):
            getattr(self, name).load_state_dict(state[name])
        for name in _REMEMBERED:
            setattr(self, name, list(state[name]))


_REMEMBERED = ("states", "actions", "log_odds", "expected", "rewards")


def _network(inputs: int, outputs: int, generator: torch.Generator, dtype: torch.dtype) -> nn.Sequential:
    sizes = (inputs, HIDDEN, HIDDEN, outputs)
    layers: list[nn.Module] = []
    for width, size in pairwise(sizes):
        layer = nn.Linear(width, size, dtype=dtype, device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])
