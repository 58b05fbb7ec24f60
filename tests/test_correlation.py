"""Correlation, dense and on demand, against torchvision's and against a plain form without interpolation routines."""

import logging
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.optical_flow.raft import CorrBlock

from modeling_raft import correlation_raft
from modeling_raft.correlation_raft import TILE, DenseCorrelation, OnDemandCorrelation, make_correlation, pixel_grid
from modeling_raft.memory_raft import host_memory

both = pytest.mark.parametrize("Correlation", [DenseCorrelation, OnDemandCorrelation])


def grid_like(fmap: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = fmap.shape
    return pixel_grid(batch, height, width, fmap.dtype, fmap.device)


def plain_lookup(fmap1, fmap2, centroids, num_levels, radius):
    """Section 3.2 of the paper as loops over single numbers; outside of frame 2 correlation is 0."""
    batch, channels, height, width = fmap1.shape
    side = 2 * radius + 1
    out = fmap1.new_zeros(batch, num_levels * side * side, height, width)
    for level in range(num_levels):
        h2, w2 = height // 2**level, width // 2**level
        # averaging correlations over frame 2 is correlating with averaged features
        pooled = torch.nn.functional.avg_pool2d(fmap2, 2**level) if level else fmap2
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    corr = torch.einsum("c,chw->hw", fmap1[b, :, y, x], pooled[b]) / math.sqrt(channels)
                    for i in range(side):
                        for j in range(side):
                            px = centroids[b, 0, y, x].item() / 2**level + i - radius
                            py = centroids[b, 1, y, x].item() / 2**level + j - radius
                            x0, y0 = math.floor(px), math.floor(py)
                            value = 0.0
                            for tap_y, tap_x in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
                                if 0 <= tap_y < h2 and 0 <= tap_x < w2:
                                    weight = (1 - abs(px - tap_x)) * (1 - abs(py - tap_y))
                                    value += weight * corr[tap_y, tap_x].item()
                            out[b, level * side * side + i * side + j, y, x] = value
    return out


@both
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 11)])  # (8, 8) is a 64 x 64 image: its level 3 is 1 x 1
def test_lookup_equals_the_plain_form(Correlation, height, width):
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 1, 5, height, width, dtype=torch.float64)
    centroids = grid_like(fmap1) + 4 * torch.randn(1, 2, height, width, dtype=torch.float64)
    ours = Correlation(fmap1, fmap2, num_levels=4, radius=2).lookup(centroids)
    torch.testing.assert_close(ours, plain_lookup(fmap1, fmap2, centroids, num_levels=4, radius=2))


def run_torchvision(fmap1, fmap2, many_centroids, radius):
    oracle = CorrBlock(num_levels=4, radius=radius)
    oracle.build_pyramid(fmap1, fmap2)
    return [oracle.index_pyramid(centroids) for centroids in many_centroids]


def run_ours(Correlation, fmap1, fmap2, many_centroids, radius):
    correlation = Correlation(fmap1, fmap2, num_levels=4, radius=radius)
    return [correlation.lookup(centroids) for centroids in many_centroids]


def draw_weights(windows):
    """Draw weights of the windows' shape and type; for every precision, they are the same numbers."""
    return torch.randn(windows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(windows)


def with_gradients(run, fmap1, fmap2, *args):
    """The results of several lookups, and the gradients of one scalar made of them."""
    fmap1, fmap2 = fmap1.clone().requires_grad_(), fmap2.clone().requires_grad_()
    windows = torch.stack(run(fmap1, fmap2, *args))
    weights = draw_weights(windows)
    return windows.detach(), *torch.autograd.grad((weights * windows).sum(), [fmap1, fmap2])


@pytest.mark.slow
@both
@pytest.mark.parametrize(("radius", "spread"), [(3, 5), (4, 5), (4, 80), (0, 5)])  # at 80, most leave the grid
def test_lookups_and_their_gradients_are_torchvisions(Correlation, radius, spread):
    torch.manual_seed(0)
    height, width = 2 * TILE + 3, 3 * TILE - 1  # neither fits the tiles, nor halves evenly
    fmap1, fmap2 = torch.randn(2, 2, 16, height, width, dtype=torch.float64)
    many = [grid_like(fmap1) + spread * torch.randn(2, 2, height, width, dtype=torch.float64) for _ in range(3)]
    expected = with_gradients(run_torchvision, fmap1, fmap2, many, radius)
    for ours, theirs in zip(
        with_gradients(run_ours_with(Correlation), fmap1, fmap2, many, radius), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    single = [centroids.float() for centroids in many]
    for ours, theirs in zip(
        with_gradients(run_ours_with(Correlation), fmap1.float(), fmap2.float(), single, radius), expected, strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)


def run_ours_with(Correlation):
    return lambda *args: run_ours(Correlation, *args)


@both
def test_backward_passes_do_not_mix(Correlation):
    """Lookups of one pair of frames may be differentiated apart, in part, and again."""
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 1, 8, 12, 20, dtype=torch.float64).requires_grad_().unbind()
    many = [grid_like(fmap1) + 3 * torch.randn(1, 2, 12, 20, dtype=torch.float64) for _ in range(2)]
    first, second = (windows.square().sum() for windows in run_ours(Correlation, fmap1, fmap2, many, 3))
    parts = [torch.autograd.grad(loss, [fmap1, fmap2], retain_graph=True) for loss in (first, second, first)]
    whole = torch.autograd.grad(first + second, [fmap1, fmap2])
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i])
        torch.testing.assert_close(parts[0][i], parts[2][i])


@both
def test_second_derivatives_are_refused_rather_than_wrong(Correlation):
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 1, 8, 12, 20).requires_grad_().unbind()
    (windows,) = run_ours(Correlation, fmap1, fmap2, [grid_like(fmap1) + 0.5], 3)
    with pytest.raises(RuntimeError, match=r"second derivatives|differentiate twice"):
        (gradient,) = torch.autograd.grad(windows.square().sum(), fmap1, create_graph=True)
        gradient.sum().backward()


@both
def test_one_side_can_be_without_a_gradient(Correlation):
    torch.manual_seed(0)
    fmap1, fmap2 = torch.randn(2, 1, 8, 12, 20)
    centroids = grid_like(fmap1) + 0.5
    both_sides = with_gradients(run_ours_with(Correlation), fmap1, fmap2, [centroids], 3)
    weights = draw_weights(both_sides[0])
    for i in range(2):
        fmaps = [fmap1, fmap2]
        fmaps[i] = fmaps[i].clone().requires_grad_()
        (weights * torch.stack(run_ours(Correlation, *fmaps, [centroids], 3))).sum().backward()
        torch.testing.assert_close(fmaps[i].grad, both_sides[1 + i])


@both
def test_far_outside_is_zero(Correlation):
    fmap = torch.randn(1, 4, 8, 8)
    correlation = Correlation(fmap, fmap, num_levels=4, radius=4)
    for far in (1e4, -1e4, 1e30, -1e30):
        assert (correlation.lookup(torch.full((1, 2, 8, 8), far)) == 0).all()


@both
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_flow_that_is_no_number_spoils_its_own_pixel_only(Correlation, number):
    torch.manual_seed(0)
    fmap = torch.randn(1, 4, 20, 24)
    correlation = Correlation(fmap, fmap, num_levels=3, radius=2)
    centroids = grid_like(fmap) + torch.randn(1, 2, 20, 24)
    expected = correlation.lookup(centroids)
    centroids[0, :, 5, 7] = number
    windows = correlation.lookup(centroids)
    assert not windows[..., 5, 7].isfinite().all()  # a loss made of it says so
    windows[..., 5, 7] = expected[..., 5, 7]
    torch.testing.assert_close(windows, expected)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_correlated_in_float32(Correlation, dtype):
    torch.manual_seed(0)
    fmap1, fmap2 = (200 * torch.randn(2, 1, 64, 8, 8)).to(dtype)
    centroids = grid_like(fmap1.float()) + 0.3
    expected = Correlation(fmap1.double(), fmap2.double(), 2, 3).lookup(centroids.double())
    assert expected.abs().max() * 8 > torch.finfo(torch.float16).max  # the dot products overflow float16
    with torch.autocast("cpu", dtype=dtype):
        ours = Correlation(fmap1, fmap2, 2, 3).lookup(centroids.to(dtype).float())
        exact = Correlation(fmap1, fmap2, 2, 3).lookup(centroids)
    assert ours.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(exact.double(), expected, rtol=1e-4, atol=0.5)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that is made while this is entered."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest_tensor(Correlation, height: int, width: int) -> int:
    """Return the size of the largest tensor of a lookup and its backward pass, around flow of up to 6 grid pixels."""
    fmap1, fmap2 = torch.randn(2, 1, 8, height, width).requires_grad_().unbind()
    flow = torch.nn.functional.interpolate(6 * torch.rand(1, 2, 3, 3), size=(height, width), mode="bilinear")
    with LargestTensor() as largest:
        Correlation(fmap1, fmap2, 4, 4).lookup(grid_like(fmap1) + flow).sum().backward()
    return largest.elements


@pytest.mark.slow
def test_memory_on_demand_grows_with_the_pixels():
    torch.manual_seed(0)
    for height, width in ((32, 48), (64, 96), (96, 144)):
        assert largest_tensor(OnDemandCorrelation, height, width) <= 324 * height * width + 10**6  # the result itself
    assert largest_tensor(DenseCorrelation, 64, 96) >= (64 * 96) ** 2


def test_auto_chooses_by_memory_and_says_so(monkeypatch, caplog):
    fmap = torch.randn(1, 4, 16, 24)
    columns = 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3
    needed = 16 * 24 * columns * 4
    monkeypatch.setattr(correlation_raft.logger, "propagate", True)
    caplog.set_level(logging.DEBUG, correlation_raft.logger.name)
    for free, trains, expected in (
        (2 * needed, False, DenseCorrelation),
        (2 * needed - 1, False, OnDemandCorrelation),
        (0, True, DenseCorrelation),  # what is free must not change how a run computes
    ):
        monkeypatch.setattr(correlation_raft, "device_memory", lambda device, free=free: (free, 8 * needed))
        fmap.requires_grad_(trains)
        assert type(make_correlation("auto", fmap, fmap, 4, 4)) is expected
        word = "dense" if expected is DenseCorrelation else "on_demand"
        assert f"grid pixels: {word}" in caplog.messages[-1]
    monkeypatch.setattr(correlation_raft, "device_memory", lambda device: (10**12, 8 * needed - 1))
    assert type(make_correlation("auto", fmap, fmap, 4, 4)) is OnDemandCorrelation
    assert type(make_correlation("dense", fmap, fmap, 4, 4)) is DenseCorrelation
    assert type(make_correlation("on_demand", fmap, fmap, 4, 4)) is OnDemandCorrelation


def test_memory_of_a_container_counts(tmp_path):
    free, total = host_memory(tmp_path, tmp_path / "nothing")
    assert free == total > 2**28
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99 kB\nMemAvailable: {2**17} kB\n")
    assert host_memory(tmp_path, meminfo) == (2**27, total)
    (tmp_path / "memory.max").write_text(f"{2**26}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2**25}\nfile {2**30}\n")
    assert host_memory(tmp_path, meminfo) == (2**25, 2**26)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path, meminfo) == (2**27, total)


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="must be auto or one of dense, on_demand; got 'on-demand'"):
        make_correlation("on-demand", torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), 2, 2)
