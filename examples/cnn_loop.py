"""A small convolutional net under SGD on 8x8 digit images: inner channels grow. Offline, some seconds on one core.

    python examples/cnn_loop.py

Needs scikit-learn: pip install 'esper-morph[demo]'
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import esper

STEPS = 500

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images = (torch.tensor(digits.images, dtype=torch.float32) / 16)[order].unsqueeze(1)
labels = torch.tensor(digits.target)[order]
train_x, train_y = images[:1000], labels[:1000]
held_out = [(images[i : i + 10], labels[i : i + 10]) for i in range(1000, 1400, 10)]
test_x, test_y = images[1400:], labels[1400:]


class Net(nn.Module):
    """The span conv1-conv2 (with the batch norm between) is what can grow: 3 inner channels are few."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.classifier = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS)
config = esper.Config(
    total_steps=STEPS,
    graft=esper.GraftConfig(ramp_steps=20, warmup_steps=20, settle_steps=20),
    tamiyo=esper.TamiyoConfig(first=50, growth=2.0),
)
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

plain = grower.export().eval()
print(plain)
with torch.no_grad():
    print(f"test accuracy {float((plain(test_x).argmax(1) == test_y).float().mean()):.3f}")
