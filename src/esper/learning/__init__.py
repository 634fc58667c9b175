"""How a policy learns: environments, PPO, cloning, and what is watched meanwhile. Nothing a growing run needs."""
