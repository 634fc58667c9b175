"""An exported model is an ordinary one: equal outputs, wider layers, nothing of Esper inside."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.example_sites import attached, plant, settle
from torch import Tensor, nn

from esper.errors import ExportError
from esper.export import check_equal, default_tolerance, merged, structure
from esper.kasmina.execution import Kasmina

pytestmark = pytest.mark.component


class Net(nn.Module):
    """conv, norm, ReLU, conv; pooled; then a chain of three Linear layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 6), nn.Linear(6, 7, bias=False), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.bn(self.conv1(x)))).mean((2, 3))
        h = F.dropout(F.gelu(self.fc1(h)), 0.5, self.training)
        return self.fc3(F.silu(self.fc2(h)))


SPANS = {"conv1-conv2": "bottleneck_conv", "fc1-fc2": "bottleneck", "fc2-fc3": "bottleneck"}
LAYERS = {"conv1": "low_rank", "fc1": "low_rank", "fc2": "low_rank", "fc3": "low_rank"}


def _grown(sites: dict[str, str], *, generations: int = 2) -> tuple[Net, Kasmina, Tensor]:
    model, x = Net(), torch.randn(6, 2, 8, 8)
    for _ in range(3):
        model(torch.randn(6, 2, 8, 8))
    kasmina = attached(model, x, layers=any(name in LAYERS for name in sites))
    for generation in range(1, generations + 1):
        for site, blueprint in sites.items():
            plant(kasmina, site, blueprint, units=generation + 1, cohort=generation)
            settle(kasmina, site, cohort=generation)
    with torch.no_grad():
        for here in kasmina.sites.values():
            for value in [] if here.annex is None else here.annex.params.values():
                value.add_(0.1 * torch.randn(value.shape))  # what a widened read has learned since
    model.train()
    model(torch.randn(6, 2, 8, 8))
    return model, kasmina, x


@pytest.mark.parametrize("sites", [SPANS, LAYERS, SPANS | LAYERS], ids=["spans", "layers", "both"])
def test_the_exported_model_computes_the_same(sites: dict[str, str]) -> None:
    model, kasmina, x = _grown(sites)
    plain = merged(model, kasmina)
    model.eval(), plain.eval()
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-4)
    before = nn.Module.state_dict(model)
    fresh = Net().eval()
    fresh.load_state_dict(before)
    assert float((fresh(x) - plain(x)).detach().abs().max()) > 1e-3, "the growth is worth exporting"


def test_nothing_of_esper_is_left() -> None:
    model, kasmina, x = _grown(SPANS | LAYERS)
    plain = merged(model, kasmina)
    for module in plain.modules():
        stores = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        assert not any(stores)
        assert not module._forward_hooks_with_kwargs and not module._forward_pre_hooks_with_kwargs
        assert type(module).__module__.split(".")[0] in ("torch", __name__.split(".")[0])
        assert not any("esper" in type(value).__module__ for value in vars(module).values())
    assert b"esper" not in pickle.dumps(plain.state_dict())
    assert {type(module) for module in plain.modules()} == {type(module) for module in Net().modules()}
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_hooks_of_the_user_stay() -> None:
    model, kasmina, x = _grown(SPANS)
    calls: list[str] = []
    model.bn.register_forward_hook(lambda *_: calls.append("norm"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    merged(model, kasmina)(x)
    assert calls == ["model"], "a replaced layer is a new module; the others keep their hooks"


def test_the_grown_model_is_untouched(request: pytest.FixtureRequest) -> None:
    model, kasmina, x = _grown(SPANS | LAYERS)
    model.eval()
    before, out = copy.deepcopy(model.state_dict()), model(x).detach()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()]
    request.getfixturevalue("unchanged_rng")
    plain = merged(model, kasmina)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(model(x), out)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [m.training for m in model.modules()] == flags


def test_modes_and_frozen_flags_move_along() -> None:
    model, kasmina, _ = _grown(SPANS)
    model.bn.eval()
    model.fc1.bias.requires_grad_(False)
    plain = merged(model, kasmina)
    assert not plain.bn.training and plain.fc1.training  # type: ignore[union-attr]
    assert not plain.fc1.bias.requires_grad and plain.fc1.weight.requires_grad  # type: ignore[union-attr]


def test_the_structure_is_enough_to_rebuild_it() -> None:
    model, kasmina, x = _grown(SPANS | LAYERS)
    plain = merged(model, kasmina).eval()
    shape = structure(plain, kasmina)
    # grown 2 + 3 units a site, over the host's widths 4, 6 and 7
    assert shape["conv1"] == {"in_channels": 2, "out_channels": 9} and shape["bn"] == {"num_features": 9}
    assert shape["conv2"] == {"in_channels": 9, "out_channels": 5}
    assert shape["fc2"] == {"in_features": 11, "out_features": 12}
    rebuilt = Net()
    for name, sizes in shape.items():
        old = rebuilt.get_submodule(name)
        options: dict[str, object] = {}
        if isinstance(old, nn.Conv2d):
            options = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
        if not isinstance(old, nn.BatchNorm2d):
            options["bias"] = old.bias is not None
        setattr(rebuilt, name, type(old)(**sizes, **options))
    rebuilt.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(rebuilt.eval()(x), plain(x))


def test_without_growth_the_export_is_the_host() -> None:
    model, x = Net().eval(), torch.randn(2, 2, 8, 8)
    kasmina = attached(model, x)
    plain = merged(model, kasmina)
    assert torch.equal(plain(x), model(x)) and structure(plain, kasmina) == {}


def test_a_cohort_on_trial_is_refused() -> None:
    model, kasmina, _ = _grown({"fc1-fc2": "bottleneck"})
    plant(kasmina, "fc1-fc2", "bottleneck", cohort=7)
    with pytest.raises(ExportError, match=r"cohorts \[7\] still on trial"):
        merged(model, kasmina)


def test_a_low_precision_host_keeps_its_dtype() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).bfloat16(), torch.randn(8, 4).bfloat16()
    kasmina = attached(model, x)
    plant(kasmina, "0-2", "bottleneck")
    settle(kasmina, "0-2")
    plain = merged(model, kasmina)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(x), model(x), atol=0.05, rtol=0.05)
    assert default_tolerance({torch.float32, torch.bfloat16}) > default_tolerance({torch.float32}) == 1e-4


def _loss(value: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, batch: model(batch).sum() * value


def test_the_check_measures_what_the_model_returns() -> None:
    """Also where the loss does not show it: the largest difference as a share of the largest output."""

    class Both(nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x, "index": torch.zeros(2, dtype=torch.long), "b": 4 * x + torch.tensor([self.shift, 0.0])}

    one, two = Both(0.0), Both(0.5)
    found = check_equal(one, two, lambda m, b: m(b)["a"].sum(), torch.tensor([1.0, 2.0]), tolerance=0.0)
    assert found.loss == 0.0 and found.output == 0.5 / 8
    assert not one._forward_hooks and not two._forward_hooks


def test_the_check_compares_both_and_refuses_a_difference(unchanged_rng: None) -> None:
    one, two = nn.Identity(), nn.Flatten(0)
    batch = torch.ones(4)
    found = check_equal(one, two, _loss(1.0), batch, tolerance=0.0)
    assert found.loss == found.output == 0.0
    assert math.isnan(check_equal(one, two, lambda m, b: b.sum(), batch, tolerance=0.0).output)  # calls no model
    with pytest.raises(ExportError, match=r"differs by 0\.25 \(relative\), allowed is 0\.1"):
        check_equal(one, nn.Softplus(), lambda m, b: b.sum() if m is one else b.sum() * 1.25, batch, tolerance=0.1)
    with pytest.raises(ExportError, match="nan"):
        check_equal(one, two, _loss(float("nan")), batch, tolerance=1.0)


def test_the_rounding_of_a_small_loss_is_no_difference() -> None:
    """A confident classifier's loss is what is left of large logits: it may differ although the models are equal."""
    torch.manual_seed(0)
    one = nn.Linear(8, 4)
    with torch.no_grad():
        one.bias.copy_(torch.tensor([300.0, 290.0, 290.0, 290.0]))
    two, far = copy.deepcopy(one), copy.deepcopy(one)
    with torch.no_grad():
        two.bias[0].copy_(torch.nextafter(two.bias[0], torch.tensor(400.0)))
        far.bias[0] += 0.1
    x, y = torch.randn(16, 8), torch.zeros(16, dtype=torch.long)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch), y)

    found = check_equal(one, two, loss, x, tolerance=1e-5)
    assert found.loss > 1e-5 and found.output < 1e-5 / 30
    with pytest.raises(ExportError, match="its loss differs"):
        check_equal(one, far, loss, x, tolerance=1e-5)
