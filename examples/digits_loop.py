"""A plain training loop that grows an undersized MLP on scikit-learn's digits. Offline, some seconds on one core.

    python examples/digits_loop.py

Needs scikit-learn: pip install 'esper-morph[demo]'
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import esper

STEPS = 800

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order]
labels = torch.tensor(digits.target)[order]

# 1,000 images to train on, 400 for Esper's decisions in small batches, 397 that nothing is decided with
train_x, train_y = images[:1000], labels[:1000]
held_out = [(images[i : i + 10], labels[i : i + 10]) for i in range(1000, 1400, 10)]
test_x, test_y = images[1400:], labels[1400:]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model):
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
config = esper.Config(total_steps=STEPS, tamiyo=esper.TamiyoConfig(growth=2.0))
grower = esper.Grower(model, optimizer, loss=loss_fn, evaluate=held_out, config=config)
print(grower)

for _ in range(STEPS):
    rows = torch.randint(len(train_x), (64,))
    loss = loss_fn(model, (train_x[rows], train_y[rows]))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    grower.step(loss)

grower.finish()
print(grower.report())

plain = grower.export()
print(plain)
print(f"test accuracy {accuracy(plain):.3f}")
