"""An adapter merged into its base: one model without adapters, and how far its logits are from those of the two."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from burnish.data.packing import collate
from burnish.files import written_aside
from burnish.model.adapter_files import TOKENIZER_FILES, fill_adapter, load_adapter, read_adapter
from burnish.model.adapters import ADAPTERS, HEAD, Adapter
from burnish.model.checkpoint import load_model, weight_shapes
from burnish.model.families import read_config, read_json
from burnish.model.storage import NF4, Dense
from burnish.types import Batch, Sequence

INDEX = "model.safetensors.index.json"


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
    shard in memory at a time. Raises ValueError for an adapter that does not fit, and for a folder that is not empty.

    The report compares, on `tokens` (none: random ones), the logits of the merged model with those of the base and
    the adapter beside it: largest and mean difference, KL divergence, share of tokens with the same best next token.
    That loads first the one, then the other; `check=False` does without, where memory is short.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose a new folder")
    config = read_config(base)
    with ExitStack() as stack:
        merger = _Merger(_open(base, stack), weight_shapes(config), adapter, onto == "nf4", double_quant)
        with written_aside(out) as aside:
            _write_shards(merger, aside)
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
        self, files: dict[Path, Any], shapes: Mapping[str, tuple[int, ...]], adapter: Path, nf4: bool, double: bool
    ) -> None:
        self.files, self.nf4, self.double = files, nf4, double
        self.where = {name: handle for handle in files.values() for name in handle.keys()}  # noqa: SIM118
        # Older files lack the `model.` in front of their names, those of models that also see have more there.
        embedding = next(name for name in self.where if name.endswith("embed_tokens.weight"))
        self.prefix = embedding.removesuffix("embed_tokens.weight")
        matrices = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}
        matrices.pop("model.embed_tokens")
        self.matrices = matrices
        self.dtype: torch.dtype = self.where[embedding].get_tensor(embedding).dtype
        self.quantised = any(name.endswith(_NF4_STATE) for name in self.where)
        self.spec, self.parts = read_adapter(adapter, self.matrices)

    def tensors(self, file: Path) -> dict[str, Tensor]:
        """The merged tensors of one file of the base, by name."""
        # The scales and tables of a quantised weight are called NAME.weight.SOMETHING.
        names = [name for name in self.files[file].keys() if ".weight." not in name]  # noqa: SIM118
        return {name: self._merged(name) for name in names}

    def _merged(self, name: str) -> Tensor:
        path, _, part = self._canonical(name).rpartition(".")
        tensor: Tensor = self.where[name].get_tensor(name)
        if path not in self.matrices:
            return tensor
        if part == "bias":
            merged = self._adapter(path, None).merge_bias(tensor) if path in self.parts else tensor
            return merged.to(tensor.dtype)
        weight, changed = self._weight(name, tensor, requantise=self.nf4 and path != HEAD)
        if path in self.parts:
            weight, changed = self._adapter(path, weight).merge(weight), True
        if not changed:
            return tensor
        merged = weight.to(tensor.dtype if tensor.is_floating_point() else self.dtype)
        if not bool(merged.isfinite().all()):
            raise ValueError(f"{name} would overflow {merged.dtype} once merged: the adapter's weights are too large")
        return merged

    def _weight(self, name: str, tensor: Tensor, requantise: bool) -> tuple[Tensor, bool]:
        """The weight that the adapter is added to, in fp32, and whether it differs from what the file holds."""
        if f"{name}{_NF4_STATE}" in self.where:
            parts = {key: self.where[key].get_tensor(key) for key in self.where if key.startswith(f"{name}.")}
            stored = NF4.from_bitsandbytes(name.removesuffix(".weight"), {name: tensor} | parts)
            return stored.dense(torch.float32), True
        if requantise:
            return NF4.encode(tensor, self.double).dense(torch.float32), True
        return tensor.float(), False

    def _adapter(self, path: str, weight: Tensor | None) -> Adapter:
        """The adapter's part in one layer; scaling a bias takes no weight."""
        stored = Dense(torch.zeros(self.matrices[path]) if weight is None else weight, trainable=False)
        adapter = ADAPTERS[self.spec.kind](stored, path, self.spec, torch.Generator())
        fill_adapter(adapter, self.parts[path])
        return adapter

    def _canonical(self, name: str) -> str:
        """What the decoder calls the tensor."""
        if name.endswith(f"{HEAD}.weight"):
            return f"{HEAD}.weight"
        return f"model.{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name


def _open(base: Path, stack: ExitStack) -> dict[Path, Any]:
    """The safetensors files of a base, opened."""
    names = {"model.safetensors"}
    if (base / INDEX).is_file():
        names = set(json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    return {
        base / name: stack.enter_context(cast(Any, safe_open(base / name, framework="pt"))) for name in sorted(names)
    }


def _write_shards(merger: _Merger, folder: Path) -> None:
    """The merged weights, in files of the same names as the base's, and their index where there are several."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in merger.files:
        tensors = merger.tensors(file)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(merger.files) > 1 or "model.safetensors" not in weight_map.values():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_rest(base: Path, adapter: Path, folder: Path) -> None:
    """Everything but weights: the base's, with the tokenizer and template that the adapter was trained with."""
    config = {key: value for key, value in read_json(base).items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for source, names in ((base, ("generation_config.json", *TOKENIZER_FILES)), (adapter, TOKENIZER_FILES)):
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


@torch.no_grad()
def _logits(folder: Path, storage: str, batch: Batch, adapter: Path | None = None, double: bool = True) -> Tensor:
    """A model's logits, with activations in fp32 so that nothing but the weights tells two models apart."""
    model = load_model(folder, storage, double_quant=double).eval()
    if adapter is None:
        return model.logits(batch)
    load_adapter(model, adapter, "beside")
    return model.logits(batch, "beside")


_NF4_STATE = ".quant_state.bitsandbytes__nf4"
