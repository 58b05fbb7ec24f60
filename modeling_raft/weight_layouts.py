"""Names of RAFT's weights in princeton-vl, torchvision and this project, and recognizing a checkpoint by them."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from .checkpoint_files import few
from .configuration_raft import RaftConfig
from .modeling_raft import RaftForOpticalFlow

# Modules of a RAFT in any of the namings. A prefix before one of them is a module that wraps the RAFT.
RAFT_MODULES = {
    *("fnet", "cnet", "update_block"),
    *("feature_encoder", "context_encoder", "mask_predictor", "upsampler"),
}
# Modules in which torch wraps another, the model or a part of it: DataParallel and DDP, torch.compile, FSDP.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Keys under which training programs save the weights; of several that fit, the first is taken.
CONTAINERS = "state_dict model model_state_dict net params weights raft network model_state state".split()
MAX_DEPTH = 6  # of nested dictionaries
# Networks other than RAFT, for messages, and modules by which each is recognized; all of them must be there. The order
# matters, since some of these networks are a RAFT with additions.
OTHER_ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "SEA-RAFT": ("upsample_weight.0", "init_conv", "cnet.final_conv"),
    "GMA (RAFT with global motion aggregation)": ("att.to_qk", "update_block.aggregator"),
    "RAFT-Stereo": ("context_zqr_convs", "update_block"),
    "GMFlow or UniMatch": ("feature_flow_attn", "transformer.layers"),
    "FlowFormer": ("memory_encoder", "memory_decoder"),
    "a RAFT of mmflow": ("decoder.gru", "decoder.flow_pred", "context"),
    "FlowNet2": ("flownetc", "flownets_1"),
    "PWC-Net": ("predict_flow6", "upfeat6", "dc_conv1"),
    "FlowNet": ("predict_flow6", "deconv5", "upsampled_flow6_to_5"),
    "SPyNet": ("basic.0.basic.0",),
    "LiteFlowNet": ("features", "matching", "subpixel", "regularization"),
    "a ResNet": ("layer1.0.conv1", "layer4.0.conv1"),
    "a VGG": ("features.0", "classifier.0"),
    "a Vision Transformer": ("blocks.0.attn.qkv",),
    "a Vision Transformer of torchvision": ("encoder.layers.encoder_layer_0",),
    "the UNet of a diffusion model": ("down_blocks.0", "mid_block"),
    "a language model": ("embed_tokens", "layers.0.self_attn"),
    "a BERT": ("embeddings.word_embeddings", "encoder.layer.0"),
}


@dataclass(frozen=True, eq=False)
class Layout:
    """The names and shapes of the weights of a RAFT in one naming.

    Attributes:
        title: The naming and the size of the model, for messages.
        config: Configuration of the model.
        names: Our name of every tensor -> their name.
        shapes: Their names -> shapes.
        duplicates: Their names of tensors that are saved twice.
    """

    title: str
    config: RaftConfig
    names: dict[str, str]
    shapes: dict[str, torch.Size]
    duplicates: frozenset[str]

    @property
    def is_ours(self) -> bool:
        return all(name == other for name, other in self.names.items())


@dataclass(eq=False)
class Fit:
    """A part of a checkpoint, compared with a layout.

    Attributes:
        path: Prefix of the names: keys of dictionaries, then modules that wrap the RAFT ("state_dict.raft.").
        weights: Names without the prefix -> tensors.
        beside: Tensors of the same dictionary that belong to other modules.
        layout: The layout it is compared with.
    """

    path: str
    weights: dict[str, Tensor]
    beside: list[str]
    layout: Layout

    @cached_property
    def missing(self) -> list[str]:
        # BatchNorm's count of batches does not affect what a network computes, and torch 0.4 did not save it.
        return [
            name
            for name in self.layout.shapes
            if name not in self.weights and not name.endswith(".num_batches_tracked")
        ]

    @cached_property
    def mismatched(self) -> list[str]:
        found = []
        for name, shape in self.layout.shapes.items():
            tensor = self.weights.get(name)
            if tensor is None:
                continue
            if tensor.shape != shape:
                found.append(f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}")
            elif (
                tensor.layout != torch.strided
                or tensor.is_meta
                or not (tensor.is_floating_point() or name.endswith(".num_batches_tracked"))
            ):
                found.append(f"{name} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
        return found

    @cached_property
    def unknown(self) -> list[str]:
        return [name for name in self.weights if name not in self.layout.shapes and name not in self.layout.duplicates]

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.mismatched or self.unknown)

    @property
    def num_known(self) -> int:
        """How many names of the layout the checkpoint has."""
        return len(self.layout.shapes.keys() & self.weights.keys())

    @property
    def num_fitting(self) -> int:
        """How many tensors fit in name, shape and type."""
        return self.num_known - len(self.mismatched)


def module_names(config: RaftConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the names of every module that has weights: (ours, princeton's, torchvision's)."""
    for ours, theirs in (("feature_encoder", "fnet"), ("context_encoder", "cnet")):
        for name, princeton, torchvision in encoder_module_names(config):
            yield f"{ours}.{name}", f"{theirs}.{princeton}", f"{ours}.{torchvision}"

    def update(ours: str, princeton: str, torchvision: str) -> tuple[str, str, str]:
        return f"update_block.{ours}", f"update_block.{princeton}", f"update_block.{torchvision}"

    for i in range(len(config.motion_corr_widths)):
        yield update(f"motion_encoder.corr_convs.{i}", f"encoder.convc{i + 1}", f"motion_encoder.convcorr{i + 1}.0")
    for i in range(len(config.motion_flow_widths)):
        yield update(f"motion_encoder.flow_convs.{i}", f"encoder.convf{i + 1}", f"motion_encoder.convflow{i + 1}.0")
    yield update("motion_encoder.fusion", "encoder.conv", "motion_encoder.conv.0")
    for i in range(len(config.gru_kernels)):
        number = i + 1 if len(config.gru_kernels) > 1 else ""  # princeton's single GRU has no number
        for gate, letter in (("update_gate", "z"), ("reset_gate", "r"), ("candidate", "q")):
            yield update(
                f"grus.{i}.{gate}", f"gru.conv{letter}{number}", f"recurrent_block.convgru{i + 1}.conv{letter}"
            )
    yield update("flow_head.0", "flow_head.conv1", "flow_head.conv1")
    yield update("flow_head.2", "flow_head.conv2", "flow_head.conv2")
    if config.convex_upsampling:
        yield "upsampler.mask_head.0", "update_block.mask.0", "mask_predictor.convrelu.0"
        yield "upsampler.mask_head.2", "update_block.mask.2", "mask_predictor.conv"


def encoder_module_names(config: RaftConfig) -> Iterator[tuple[str, str, str]]:
    """Yield the names of every module with weights within one encoder: (ours, princeton's, torchvision's)."""
    yield "stem.conv", "conv1", "convnormrelu.0"
    yield "stem.norm", "norm1", "convnormrelu.1"
    for stage in range(3):
        for block in range(2):
            ours, theirs = f"stages.{stage}.{block}", f"layer{stage + 1}.{block}"
            for layer in range(3 if config.encoder_block == "bottleneck" else 2):
                number = layer + 1
                yield f"{ours}.layers.{layer}.conv", f"{theirs}.conv{number}", f"{theirs}.convnormrelu{number}.0"
                yield f"{ours}.layers.{layer}.norm", f"{theirs}.norm{number}", f"{theirs}.convnormrelu{number}.1"
            yield f"{ours}.shortcut.conv", f"{theirs}.downsample.0", f"{theirs}.downsample.0"
            yield f"{ours}.shortcut.norm", f"{theirs}.downsample.1", f"{theirs}.downsample.1"
    yield "projection", "conv2", "conv"


@cache
def known_layouts() -> tuple[Layout, ...]:
    """Return the layouts of the published models, as named by princeton-vl, torchvision and this project."""
    layouts = []
    for size, config in (("large", RaftConfig()), ("small", RaftConfig.small())):
        ours, princeton, torchvision = zip(*module_names(config), strict=True)
        # princeton registers the norm of a shortcut twice: downsample.1 is also the last norm of its block.
        last_norm = "norm4" if config.encoder_block == "bottleneck" else "norm3"
        layouts += [
            make_layout(f"princeton's {size} RAFT", config, dict(zip(ours, princeton, strict=True)), last_norm),
            make_layout(f"torchvision's {size} RAFT", config, dict(zip(ours, torchvision, strict=True))),
            make_layout(f"this project's {size} RAFT", config),
        ]
    return tuple(layouts)


def make_layout(
    title: str, config: RaftConfig, modules: Mapping[str, str] | None = None, shortcut_norm: str | None = None
) -> Layout:
    """Make the layout of a model.

    Args:
        title, config: Attributes of the `Layout`.
        modules: Our name of every module that has weights -> theirs; None: they are ours.
        shortcut_norm: The second name under which they save the norm of a shortcut.
    """
    with torch.device("meta"):  # shapes without memory
        tensors = RaftForOpticalFlow(config).state_dict()
    names = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        names[name] = name if modules is None else f"{modules[module]}.{kind}"
    shapes = {names[name]: tensor.shape for name, tensor in tensors.items()}
    duplicates = {name.replace("downsample.1", shortcut_norm) for name in shapes} if shortcut_norm else set()
    return Layout(title, config, names, shapes, frozenset(duplicates - shapes.keys()))


def find_state_dicts(content: Any, path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield every dictionary of tensors in a checkpoint with the keys that lead to it, except those of optimizers."""
    if not isinstance(content, Mapping) or path.count(".") > MAX_DEPTH:
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield path, tensors
    for name, value in content.items():
        if isinstance(name, str) and not name.startswith("optimizer"):
            yield from find_state_dicts(value, f"{path}{name}.")


def fit_layouts(path: str, tensors: Mapping[str, Tensor], layouts: Sequence[Layout]) -> Iterator[Fit]:
    """Yield the best fitting layout for each part of a state dict that may be a RAFT.

    A RAFT may be a part of another module. Tensors with the prefix of the RAFT belong to it, and must be known;
    others (`criterion.weight` beside `raft.fnet.conv1.weight`) belongs to other modules.
    """
    origins = {name: _raft_prefix(name) for name in tensors}
    groups: dict[str, list[str]] = {}
    for prefix in dict.fromkeys(prefix for prefix in origins.values() if prefix is not None):
        groups.setdefault(_unwrap(prefix), []).append(prefix)
    for prefixes in _separate_clashes(groups.values(), origins):
        weights = {}
        for name in tensors:
            origin = origins[name]
            if origin is None:  # not in a module of a RAFT, but perhaps under the same prefix
                origin = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if origin in prefixes:
                weights[_unwrap(name.removeprefix(origin))] = name
        beside = sorted(tensors.keys() - weights.values())
        fits = [
            Fit(path + prefixes[0], {name: tensors[source] for name, source in weights.items()}, beside, layout)
            for layout in layouts
        ]
        yield max(fits, key=_closeness)


def choose_fit(fits: Sequence[Fit]) -> Fit:
    """Choose one of several RAFTs: averaged weights (EMA) before others, then in the order of `CONTAINERS`.

    Args:
        fits: At least one of them is complete.

    Raises:
        ValueError: Several are complete and differ, and none is where training programs save the final weights.
    """
    complete: list[Fit] = []
    for fit in sorted((fit for fit in fits if fit.is_complete), key=_rank):
        if not any(_same_weights(fit, other) for other in complete):
            complete.append(fit)
    usual = [fit for fit in complete if is_usual_path(fit.path)]
    if usual:
        rivals = [fit for fit in usual if _rank(fit) == _rank(usual[0])]
    else:
        rivals = [
            fit for fit in complete if fit is complete[0] or _plain_words(fit.path) != _plain_words(complete[0].path)
        ]
    if len(rivals) > 1:
        raise ValueError(
            f"holds RAFT models that differ, under {few([fit.path or 'no prefix' for fit in rivals])}: "
            "save the state dict of the one that you want by itself"
        )
    return rivals[0]


def is_usual_path(path: str) -> bool:
    """Whether a path is one where training programs save the weights to be used."""
    return all(word in CONTAINERS for word in _plain_words(path))


def is_averaged(path: str) -> bool:
    """Whether a path is one where training programs save the moving average (EMA) of the weights."""
    return any("ema" in _tokens(word) for word in path.split("."))


def describe_misfit(state_dicts: Sequence[tuple[str, dict[str, Tensor]]], fits: Sequence[Fit]) -> str:
    """Describe weights that fit no layout, in at most five lines: likely network, nearest layout, differences."""
    tensors = max((tensors for _, tensors in state_dicts), key=len)
    fit = max(fits, key=_closeness, default=None)
    looks = recognize_architecture(tensors)
    if fit is None or not fit.num_known:
        shapes = Counter(tensor.shape for tensor in tensors.values())
        common = {layout: (Counter(layout.shapes.values()) & shapes).total() for layout in known_layouts()}
        layout = max(common, key=lambda layout: common[layout])
        if 10 * common[layout] >= 9 * len(layout.shapes):
            looks = looks or f"{layout.title} under other names"
        lines = [
            f"nearest: {layout.title}; none of its {len(layout.shapes)} tensors is there",
            f"there are {len(tensors)} tensors: {few(sorted(tensors))}",
        ]
    else:
        if 2 * fit.num_known >= min(len(fit.weights), len(fit.layout.shapes)):
            looks = looks or _describe_variant(fit)
        under = f", under {fit.path!r}" if fit.path else ""
        is_ours = fit.layout.is_ours and fit.layout in known_layouts()
        hint = "; one of other sizes needs its config.json beside the file" if is_ours else ""
        count = f"{fit.num_fitting} of its {len(fit.layout.shapes)} tensors fit"
        lines = [f"nearest: {fit.layout.title}{under}; {count}{hint}"]
        for title, names in (
            ("missing", fit.missing),
            ("of another shape or type", fit.mismatched),
            ("not known", fit.unknown),
        ):
            if names:
                lines.append(f"{title} ({len(names)}): {few(names)}")
    first = f"the weights look like {looks}, which does not fit" if looks else "these are not the weights of a RAFT"
    return "\n  ".join([first, *lines])


def recognize_architecture(names: Iterable[str]) -> str | None:
    """Return the architecture whose tensors have these names, behind any prefix; None if it is not listed."""
    # In the files of sniklaus (SPyNet, LiteFlowNet) each module is called moduleBasic, in his programs netBasic.
    text = "".join(f".{name}." for name in names)
    text = re.sub("[.](module|net)(?=[A-Z])", ".", text).lower()
    for architecture, modules in OTHER_ARCHITECTURES.items():
        if all(f".{module}." in text for module in modules):
            return architecture
    return None


def _describe_variant(fit: Fit) -> str:
    """Describe the variant of RAFT that fits a layout in most of its tensors."""
    layout, title = fit.layout, fit.layout.title
    name = layout.names["update_block.motion_encoder.corr_convs.0.weight"]
    received, expected = fit.weights.get(name), layout.shapes[name]
    correlation = None
    if len(fit.mismatched) == 1 and received is not None and received.ndim == 4 and received.shape != expected:
        correlation = correlation_shape(received.shape[1], layout.config)
    if correlation is not None:
        title += f" with {correlation[0]} correlation levels of radius {correlation[1]}"
    elif fit.mismatched:
        title += " with other shapes or types"
    if fit.unknown:
        title += f" with {len(fit.unknown)} more tensor{'s' if len(fit.unknown) > 1 else ''}"
    if fit.missing:
        title += f" without {len(fit.missing)} of its tensors"
    return title


def correlation_shape(channels: int, config: RaftConfig) -> tuple[int, int] | None:
    """Return the (levels, radius) nearest to `config` whose lookup has `channels` correlations, or None."""
    shapes = [(levels, radius) for levels in range(1, 9) for radius in range(9)]
    fitting = [shape for shape in shapes if shape[0] * (2 * shape[1] + 1) ** 2 == channels]
    return min(fitting, key=lambda s: (s[1] != config.corr_radius, s[0] != config.corr_levels), default=None)


def _raft_prefix(name: str) -> str | None:
    """Return the prefix before the first module of a RAFT in a name; None if it has no such module."""
    words = name.split(".")
    for i, word in enumerate(words):
        if word in RAFT_MODULES:
            return "".join(f"{word}." for word in words[:i])
    return None


def _unwrap(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _separate_clashes(groups: Iterable[list[str]], origins: Mapping[str, str | None]) -> Iterator[list[str]]:
    """Yield groups of prefixes that belong to one model: prefixes that differ only in wrappers, unless names clash."""
    for prefixes in groups:
        names = [_unwrap(name) for name, origin in origins.items() if origin in prefixes]
        if len(set(names)) == len(names):
            yield prefixes
        else:
            yield from ([prefix] for prefix in prefixes)


def _tokens(word: str) -> list[str]:
    return re.split(r"[_\W]+", word.lower())


def _plain_words(path: str) -> tuple[str, ...]:
    """Split a path into words, leaving out wrappers and the mark of averaged weights (EMA)."""
    words = ("_".join(token for token in _tokens(word) if token != "ema") for word in path.split("."))
    return tuple(word for word in words if word and word not in WRAPPERS)


def _closeness(fit: Fit) -> tuple[int, int, int]:
    return fit.num_fitting, fit.num_known, -len(fit.missing) - len(fit.unknown)


def _rank(fit: Fit) -> tuple[bool, list[int]]:
    words = _plain_words(fit.path)
    return not is_averaged(fit.path), [CONTAINERS.index(w) if w in CONTAINERS else len(CONTAINERS) for w in words]


def _same_weights(fit: Fit, other: Fit) -> bool:
    return fit.layout is other.layout and all(
        fit.weights[name].dtype == other.weights[name].dtype and torch.equal(fit.weights[name], other.weights[name])
        for name in fit.layout.shapes
        if name in fit.weights and name in other.weights
    )
