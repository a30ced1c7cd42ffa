"""An adapter merged into its base: one model without adapters, and how far its logits are from those of the two."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from burnish.data.packing import collate
from burnish.files import written_aside
from burnish.model.adapter_files import WEIGHTS_FILE, fill_adapter, load_adapter, read_adapter
from burnish.model.adapters import ADAPTERS, HEAD, Adapter
from burnish.model.checkpoint import copy_tokenizer, load_model, weight_shapes
from burnish.model.families import read_config, read_json
from burnish.model.storage import NF4, Dense
from burnish.model.weight_files import Entry, WeightFiles, open_weights, write_weights
from burnish.types import Batch, Sequence


def merge(
    base: Path,
    adapter: Path,
    out: Path | str,
    onto: Literal["weights", "nf4"] = "weights",
    tokens: tuple[int, ...] = (),
    double_quant: bool = True,
    check: bool = True,
) -> dict[str, Any]:
    """Write base and adapter as one model folder in Hugging Face layout; the report on what merging changed.

    `onto="weights"` adds to the weights as the base has them, `onto="nf4"` to what they become through NF4, which is
    what a QLoRA adapter was trained on. Each weight is computed in fp32 and rounded once to the base's dtype, one
    weight in memory at a time. Raises ValueError for an adapter that does not fit, a damaged base, a folder not empty.

    The report compares, on `tokens` (none: random ones), the logits of the merged model with those of the base and
    the adapter beside it: largest and mean difference, KL divergence, share of tokens with the same best next token.
    That loads first the one, then the other; `check=False` does without, where memory is short.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose a new folder")
    config = read_config(base)
    shapes = weight_shapes(config)
    with open_weights(base) as files:
        files.check(shapes, config)
        merger = _Merger(files, shapes, adapter, onto == "nf4", double_quant)
        with written_aside(out) as aside:
            write_weights(aside, merger.entries())
            _write_rest(base, adapter, aside)
    report: dict[str, Any] = {"out": str(out), "onto": onto, "layers": len(merger.parts)}
    if not check:
        return report
    if not tokens:
        generator = torch.Generator().manual_seed(0)
        tokens = tuple(torch.randint(config.vocab_size, (64,), generator=generator).tolist())
    batch = collate([Sequence(ids=tokens, weights=(1.0,) * len(tokens), row=0)])
    storage = "nf4" if onto == "nf4" or merger.quantised else "bf16" if merger.dtype == torch.bfloat16 else "fp32"
    unmerged = _logits(base, storage, batch, adapter, double_quant)
    merged = _logits(out, "bf16" if merger.dtype == torch.bfloat16 else "fp32", batch)
    return report | {"tokens": len(tokens)} | compare(unmerged, merged)


def compare(unmerged: Float[Tensor, "T V"], merged: Float[Tensor, "T V"]) -> dict[str, float]:
    """How far the second logits are from the first: differences, KL(first ‖ second) in nats, share of equal argmax."""
    difference = (merged - unmerged).abs()
    first, second = unmerged.double().log_softmax(dim=-1), merged.double().log_softmax(dim=-1)
    return {
        "max_abs_logit_error": float(difference.max()),
        "mean_abs_logit_error": float(difference.mean()),
        "mean_abs_logit": float(unmerged.abs().mean()),
        "kl": float((first.exp() * (first - second)).sum(dim=-1).mean()),
        "same_argmax": float((unmerged.argmax(dim=-1) == merged.argmax(dim=-1)).float().mean()),
    }


class _Merger:
    """The tensors of a base with an adapter's change in them, made when asked for."""

    def __init__(
        self, files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], adapter: Path, nf4: bool, double: bool
    ) -> None:
        self.files, self.shapes, self.nf4, self.double = files, shapes, nf4, double
        self.matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
        del self.matrices["model.embed_tokens"]
        self.dtype = files.header(files.name_of("model.embed_tokens.weight"))[1]
        self.quantised = any(files.is_nf4(name) for name in files.where)
        if "lm_head" not in self.matrices and _adapts_head(adapter):
            raise ValueError(
                f"{adapter}: it changes lm_head, which in {files.folder} is the embedding matrix itself: merged, it "
                "would change what goes in as well; use it unmerged"
            )
        self.spec, self.parts = read_adapter(adapter, self.matrices)

    def entries(self) -> dict[str, list[Entry]]:
        """The merged tensors, by the names of the base's files that they are in."""
        # The scales and tables of a quantised weight are called NAME.weight.SOMETHING.
        kept = {file: [n for n in names if ".weight." not in n] for file, names in self.files.names.items()}
        return {file.name: [self._entry(name) for name in names] for file, names in kept.items()}

    def _entry(self, name: str) -> Entry:
        path = self.files.path_of(name)
        shape, dtype = self.files.header(name)
        if path is None or path not in self.shapes:  # no part of the decoder
            return Entry(name, shape, dtype, partial(self.files.tensor, name))
        dtype = self.dtype if self.files.is_nf4(name) else dtype
        return Entry(name, self.shapes[path], dtype, partial(self._merged, name, path, dtype))

    def _merged(self, name: str, path: str, dtype: torch.dtype) -> Tensor:
        layer, _, part = path.rpartition(".")
        if layer not in self.matrices:
            return self.files.weight(name)
        if part == "bias":
            bias = self.files.weight(name)
            return self._adapter(layer, None).merge_bias(bias) if layer in self.parts else bias
        weight = self._weight(name, layer)
        if layer in self.parts:
            weight = self._adapter(layer, weight).merge(weight)
        merged = weight.to(dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"{name} would overflow {merged.dtype} once merged: the adapter's weights are too large")
        return merged

    def _weight(self, name: str, layer: str) -> Tensor:
        """The weight that the adapter is added to, in fp32."""
        if self.files.is_nf4(name):
            return self.files.nf4(name, self.matrices[layer]).dense(torch.float32)
        weight = self.files.weight(name)
        if self.nf4 and layer != HEAD:
            return NF4.encode(weight, self.double).dense(torch.float32)
        return weight.float()

    def _adapter(self, path: str, weight: Tensor | None) -> Adapter:
        """The adapter's part in one layer; scaling a bias takes no weight."""
        stored = Dense(torch.zeros(self.matrices[path]) if weight is None else weight, trainable=False)
        adapter = ADAPTERS[self.spec.kind](stored, path, self.spec, torch.Generator())
        fill_adapter(adapter, self.parts[path])
        return adapter


def _write_rest(base: Path, adapter: Path, folder: Path) -> None:
    """Everything but weights: the base's, with the tokenizer and template that the adapter was trained with."""
    config = {key: value for key, value in read_json(base).items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copy_tokenizer(base, folder, "generation_config.json")
    copy_tokenizer(adapter, folder)


@torch.no_grad()
def _logits(folder: Path, storage: str, batch: Batch, adapter: Path | None = None, double: bool = True) -> Tensor:
    """A model's logits, with activations in fp32 so that nothing but the weights tells two models apart."""
    model = load_model(folder, storage, double_quant=double).eval()
    if adapter is None:
        return model.logits(batch)
    load_adapter(model, adapter, "beside")
    return model.logits(batch, "beside")


def _adapts_head(adapter: Path) -> bool:
    """Whether an adapter folder has weights for the head."""
    try:
        with cast(Any, safe_open(adapter / WEIGHTS_FILE, framework="pt")) as file:
            return any("lm_head." in name for name in list(file.keys()))
    except (OSError, SafetensorError):
        return False  # what is missing or damaged is said by who reads it
