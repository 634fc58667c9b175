"""Mixed precision, a GradScaler, gradient accumulation and clipping around a grower. Offline, seconds on one core.

    python examples/amp_accumulation.py

On a GPU it computes in float16 with a GradScaler that matters; on the CPU in bfloat16, where the scaler only shows that
scaled gradients are handled.
"""

import torch
import torch.nn.functional as F
from torch import nn

import esper

STEPS, PARTS = 800, 4

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.float16 if device.type == "cuda" else torch.bfloat16

# three spiral arms, to be told apart
arm = torch.arange(6000) % 3
radius = torch.rand(6000).sqrt()
angle = 6 * radius + 2.0944 * arm
points = torch.stack([radius * angle.cos(), radius * angle.sin()], 1) + 0.02 * torch.randn(6000, 2)
points, arm = points.to(device), arm.to(device)
held_out = [(points[i : i + 50], arm[i : i + 50]) for i in range(4000, 6000, 50)]


def loss_fn(model, batch):
    with torch.autocast(device.type, dtype):
        logits = model(batch[0])
    return F.cross_entropy(logits.float(), batch[1])


model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler(device.type)
grower = esper.Grower(
    model,
    optimizer,
    loss=loss_fn,
    evaluate=held_out,
    track=[scaler],  # so that new units' gradients are unscaled, and skipped steps are skipped for them too
    config=esper.Config(total_steps=STEPS),
)

for _ in range(STEPS):
    total = torch.zeros((), device=device)
    for _ in range(PARTS):
        rows = torch.randint(4000, (32,), device=device)
        loss = loss_fn(model, (points[rows], arm[rows])) / PARTS
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    grower.step(total)  # once a real step; after each micro-batch would be right too

grower.finish()
print(grower.report())
print(grower.export())
