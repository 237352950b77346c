"""Which source keys make which parameter: transformers' own conversion mapping, applied to names alone.

`KeyMap` needs the names of a checkpoint (an index file is enough, no tensor) and a skeleton of the model on the meta
device. It groups keys as transformers' loader does (rename, then at most one converter) and can run one group's
conversion, whole or for a range of experts where the operations leave the expert axis alone.
It does not read tensors and does not know about files or quantisation.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

Tensor = torch.Tensor
# Where a checkpoint with vision or audio keeps its language model, and the name that the text model alone gives it.
TEXT_PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""),
                 ("thinker.", ""), ("model.text_model.", "model."))
SAVED_PREFIXES = ("_orig_mod.", "module.")  # of a model that was saved while it was compiled, or spread over cards
MTP = re.compile(r"(^|[._])mtp[._]")
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """The source keys that together make `targets` (one name, or several where a converter splits)."""

    targets: tuple[str, ...]
    converter: WeightConverter | None = None
    sources: dict[str, list[str]] = field(default_factory=dict)     # source pattern -> keys, experts in order

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    @property
    def keeps_experts_apart(self) -> bool:
        """True if expert e of the result depends on expert e of the sources alone."""
        return self.converter is None or all(_per_expert(op) for op in self.converter.operations)


class KeyMap:
    """Groups by target name, and the keys that no parameter of the skeleton asks for.

    groups: in the order of the checkpoint's keys. of: parameter name -> its group. mtp: source keys of
    multi-token-prediction layers. left_out: all other source keys without a place (vision, audio, old buffers). Keys of
    identity experts, which transformers writes and nobody reads, are nowhere.
    """

    def __init__(self, skeleton, keys: Iterable[str], model_type: str) -> None:
        self.skeleton = skeleton
        self._wanted = skeleton.state_dict()
        self._renamings, self._converters = _transforms(skeleton, model_type)
        by_target: dict[str, Group] = {}
        self.mtp: list[str] = []
        self.left_out: list[str] = []
        for key in sorted(keys, key=dot_natural_key):
            self._place(key, by_target)
        self._name_tied(by_target)
        self.groups = list(by_target.values())
        self.of = {target: group for group in self.groups for target in group.targets}

    def convert(self, group: Group, tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        """Source pattern -> its tensors, as in `group.sources`, to parameter name -> tensor."""
        if group.converter is None:
            return {group.targets[0]: next(iter(tensors.values()))[0]}
        converter = copy(group.converter)       # its operations keep no state, and converting empties the collection
        converter.collected_tensors = {pattern: list(parts) for pattern, parts in tensors.items()}
        made = converter.convert(group.targets[0], model=self.skeleton, config=self.skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def missing(self) -> list[str]:
        """Parameters that no source key makes, but for tied ones and those that transformers may leave unset."""
        tied = set(_tied(self.skeleton))
        may_lack = [re.compile(p) for p in getattr(self.skeleton, "_keys_to_ignore_on_load_missing", None) or ()]
        return [name for name in self._wanted if name not in self.of and name not in tied
                and not any(pattern.search(name) for pattern in may_lack)]

    def tied(self) -> dict[str, str]:
        """Parameters that are another parameter under a second name: name -> the name that is stored."""
        return {name: first for name, first in _tied(self.skeleton).items() if first in self.of}

    def left_out_summary(self) -> list[str]:
        counts = Counter(_part(key) for key in self.left_out)
        return [f"{part} ({number} tensors)" if number > 1 else part for part, number in sorted(counts.items())]

    def _place(self, key: str, by_target: dict[str, Group]) -> None:
        if self._is_identity(key):
            return
        for name in spellings(key):
            target, pattern = self._rename(name)
            if target in self._wanted:
                if target not in by_target:
                    by_target[target] = self._group(target, pattern)
                by_target[target].sources.setdefault(pattern or key, []).append(key)
                return
        (self.mtp if MTP.search(key) or self._beyond_depth(key) else self.left_out).append(key)

    def _name_tied(self, by_target: dict[str, Group]) -> None:
        """Of two tied names either may be the stored one; as for transformers it is then the other's, too."""
        for name, first in _tied(self.skeleton).items():
            group = by_target.get(name)
            if first not in by_target and group and not group.converter:
                by_target[first] = replace(by_target.pop(name), targets=(first,))

    def _rename(self, key: str) -> tuple[str, str | None]:
        prefix = self.skeleton.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._wanted)
        if target not in self._wanted and key in self._wanted:
            return rename_source_key(key, [], [], prefix, self._wanted)
        return target, pattern

    def _group(self, target: str, pattern: str | None) -> Group:
        if pattern is None:
            return Group((target,))
        converter = next(c for c in reversed(self._converters) if pattern in c.source_patterns)
        first, *others = _expanded(converter, self.skeleton.config)
        return Group((target, *(target.replace(first, other) for other in others)), converter)

    def _is_identity(self, key: str) -> bool:
        config, match = self.skeleton.config, EXPERT.search(key)
        return bool(match and getattr(config, "zero_expert_num", 0) and int(match[1]) >= config.n_routed_experts)

    def _beyond_depth(self, key: str) -> bool:
        match = LAYER.search(key)
        towers = ("vision", "visual", "audio", "image", "speech")
        depth = getattr(self.skeleton.config, "num_hidden_layers", None)
        return bool(match and depth and int(match[1]) >= depth and not any(tower in key for tower in towers))


def _transforms(skeleton, model_type: str) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    transforms = get_model_conversion_mapping(skeleton)
    own = skeleton.config.model_type
    if model_type != own:    # a composite's checkpoint: how its experts are stored is written in its own mapping
        transforms += [t for t in get_checkpoint_conversion_mapping(model_type) or () if isinstance(t, WeightConverter)]
    return ([t for t in transforms if isinstance(t, WeightRenaming)],
            [t for t in transforms if isinstance(t, WeightConverter)])


def spellings(key: str) -> Iterable[str]:
    yield key
    while key.startswith(SAVED_PREFIXES):
        key = key.partition(".")[2]
        yield key
    for prefix, plain in TEXT_PREFIXES:
        if key.startswith(prefix):
            yield plain + key.removeprefix(prefix)


def _expanded(converter: WeightConverter, config) -> list[str]:
    last = converter.operations[-1]
    if getattr(last, "num_shards_attribute", None) and hasattr(last, "get_target_patterns"):
        return last.get_target_patterns(converter.target_patterns, config=config)
    return list(converter.target_patterns)


def _per_expert(op) -> bool:
    name = type(op).__name__
    if name == "MergeModulelist":
        return op.dim == 0
    if name in ("Concatenate", "Interleave", "Chunk"):
        return op.dim >= 1
    return name == "Transpose" and {op.dim0, op.dim1} == {1, 2} and not op.check_dims


def _tied(skeleton) -> dict[str, str]:
    return dict(getattr(skeleton, "all_tied_weights_keys", None) or {})


def _part(key: str) -> str:
    """The leading words of a key, up to the first number: what a reader recognises as one part of the model."""
    words = []
    for word in key.split(".")[:2]:
        if word.isdigit():
            break
        words.append(word)
    return ".".join(words)
