"""Is our PPO as good as a known one? CartPole-v1 with the same settings, ours against stable-baselines3's.

Run from the repository root (some minutes on one core; needs ``pip install '.[bench]'``)::

    PYTHONPATH=src:. python benchmarks/controller/ppo_cartpole.py

Both train a separate tanh network of 64 and 64 units for policy and value, with eight episodes side by side, for
``--steps`` steps and with each of ``--seeds`` seeds, and are then scored greedily on 20 episodes that neither has seen
(500 is the most an episode can earn). Writes ``benchmarks/results/ppo_cartpole.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from esper.learning.environment import Ints, Stepped
from esper.learning.ppo import Collector, PPOConfig, learn
from esper.tamiyo.neural.choice import choose
from esper.tamiyo.neural.policy import Decided

RESULT = Path(__file__).parents[1] / "results" / "ppo_cartpole.json"
NAME = "CartPole-v1"
NUM = 8
CONFIG = PPOConfig(
    steps=32, epochs=20, minibatch=256, lr=1e-3, gamma=0.98, lam=0.8, clip=0.2, value_weight=0.5, max_grad_norm=0.5,
    target_kl=None,
)  # fmt: skip
TEST_EPISODES, TEST_SEED = 20, 1_000_000

Look = npt.NDArray[np.float32]


class Gymnasium:
    """Environments of gymnasium with one discrete choice, side by side."""

    def __init__(self, num: int) -> None:
        self.num = num
        self._each = [gymnasium.make(NAME) for _ in range(num)]
        self._seen: list[Look] = []

    def reset(self, seed: int) -> None:
        self._seen = [each.reset(seed=NUM * seed + row)[0] for row, each in enumerate(self._each)]

    def look(self) -> list[Look]:
        return list(self._seen)

    def step(self, actions: Ints) -> Stepped[Look]:
        rewards = np.zeros(self.num)
        terminated, truncated = np.zeros((2, self.num), dtype=np.bool_)
        last: dict[int, Look] = {}
        for row, each in enumerate(self._each):
            seen, reward, terminated[row], truncated[row], _ = each.step(int(actions[row, 0]))
            rewards[row] = float(reward)
            if terminated[row] or truncated[row]:
                last[row] = seen
                seen = each.reset()[0]
            self._seen[row] = seen
        return Stepped(rewards, terminated, truncated, last)

    def state(self) -> dict[str, Any]:
        raise NotImplementedError("a benchmark is not resumed")

    def load(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a benchmark is not resumed")


class Pair(nn.Module):
    """The default network of stable-baselines3: a policy and a critic that share nothing."""

    heads = ("push",)

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.policy, self.critic = _tower(2, 0.01), _tower(1, 1.0)

    def collate(self, seen: Sequence[Look]) -> Tensor:
        return torch.from_numpy(np.stack(seen))

    def forward(
        self, batch: Tensor, actions: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Decided:
        logits = self.policy(batch)
        found = choose(
            logits, torch.ones_like(logits, dtype=torch.bool), torch.ones(len(batch), dtype=torch.bool),
            chosen=None if actions is None else actions[:, 0], generator=generator,
        )  # fmt: skip
        value = self.critic(batch).squeeze(-1)
        return Decided(found.value[:, None], found.log_prob, found.entropy[:, None], found.free[:, None], value)


def _tower(num: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, num)]
    for layer, size in zip(layers, (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, size)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def train_ours(seed: int, steps: int) -> Any:
    """Our learner; returns what chooses greedily."""
    actor = Pair(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(actor.parameters(), CONFIG.lr, eps=1e-5)
    collector: Collector[Look] = Collector(Gymnasium(NUM), generator)
    collector.reset(seed)
    for update in range(steps // (NUM * CONFIG.steps)):
        rollout, _ = collector.collect(actor, CONFIG)
        learn(actor, optimizer, rollout, CONFIG, generator=generator, update=update)
    return lambda seen: int(actor.policy(torch.from_numpy(seen)[None]).argmax())


def train_theirs(seed: int, steps: int) -> Any:
    """stable-baselines3's."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    model = PPO(
        "MlpPolicy", make_vec_env(NAME, n_envs=NUM, seed=seed), learning_rate=CONFIG.lr, n_steps=CONFIG.steps,
        batch_size=CONFIG.minibatch, n_epochs=CONFIG.epochs, gamma=CONFIG.gamma, gae_lambda=CONFIG.lam,
        clip_range=CONFIG.clip, vf_coef=CONFIG.value_weight, max_grad_norm=CONFIG.max_grad_norm, ent_coef=0.0,
        seed=seed, device="cpu",
    )  # fmt: skip
    model.learn(steps)
    return lambda seen: int(model.predict(seen, deterministic=True)[0])


def score(choose_one: Any) -> float:
    """Mean return of whole episodes."""
    each, returns = gymnasium.make(NAME), list[float]()
    for number in range(TEST_EPISODES):
        seen, _ = each.reset(seed=TEST_SEED + number)
        total, going = 0.0, True
        while going:
            with torch.inference_mode():
                seen, reward, terminated, truncated, _ = each.step(choose_one(seen))
            total, going = total + float(reward), not (terminated or truncated)
        returns.append(total)
    return float(np.mean(returns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    import stable_baselines3

    scores: dict[str, list[float]] = {"ours": [], "stable_baselines3": []}
    seconds: dict[str, float] = dict.fromkeys(scores, 0.0)
    for seed in range(asked.seeds):
        for name, train in (("ours", train_ours), ("stable_baselines3", train_theirs)):
            start = time.process_time()
            chooser = train(seed, asked.steps)
            seconds[name] += time.process_time() - start
            scores[name].append(score(chooser))
            print(f"seed {seed} {name}: {scores[name][-1]:.1f}", flush=True)
    result = {
        "command": f"python benchmarks/controller/ppo_cartpole.py --seeds {asked.seeds} --steps {asked.steps}",
        "environment": NAME,
        "test_episodes": TEST_EPISODES,
        "scores_per_seed": scores,
        "mean_score": {name: float(np.mean(found)) for name, found in scores.items()},
        "cpu_seconds": {name: round(spent, 1) for name, spent in seconds.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
            "stable_baselines3": stable_baselines3.__version__,
        },
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
