"""How near kernels come to what the device can move and multiply.

python -m benchmarks.kernels [only=NAME] [results=FILE] [commit=HASH] [note=TEXT]

What waits for memory is held against a plain copy: the bytes that it must move, over its time, as a share of what the
copy moves in bytes read and written. Products are held against bf16 at the same shape, those of a Llama-2-7B block
with 8,192 tokens; attention in its several ways (`attended.py`) against FlashAttention 2. A burst of calls lies in a
CUDA graph, so that no launch is waited for, over buffers that together are larger than the L2 cache; a time is the
median of 20 bursts. One row is added to results.csv for each name that holds `only`; what fails is left out with the
reason.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.attended import attention_readings
from benchmarks.meter import here, stamp
from benchmarks.rows import read_words as read
from benchmarks.rows import write_row
from benchmarks.timing import Call, Reading, attempt, burst, rotated, seconds
from burnish.ops import fp8, nf4
from burnish.ops.add_norm import Gain, NormBackward, add_norm, add_norm_backward, norm_again
from burnish.ops.attention import rotary_table
from burnish.ops.gate import GateBackward, gate, gate_backward
from burnish.ops.log_probs import read_rows
from burnish.ops.outer import outer
from burnish.ops.rope import Heads, rope, rope_backward
from burnish.optim.adamw import AdamW, adamw

WORDS = {"only": "", "results": "", "commit": "", "note": ""}
"""What can be asked for, and what is measured where it is not."""
TOKENS = 8192
PRODUCTS = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
"""(outputs, inputs) of the matrices of a Llama-2-7B block."""
WEIGHTS = [(4096, 4096), (11008, 4096), (22016, 4096)]
Case = tuple[str, Call, int]
"""Its name, the call, and the bytes that the call must move at least."""


def main(asked: Mapping[str, str]) -> None:
    """Measures what is asked for, adds its rows to results.csv as they come, and prints a table of them."""
    device = here()
    if device.type != "cuda":
        raise ValueError("kernels are measured on a CUDA device, and there is none: run it where torch sees one")
    kinds = (memory_readings, product_readings, attention_readings)
    about = stamp(asked["commit"]) | {"benchmark": "kernels", "system": "burnish"}
    readings: list[Reading] = []
    for one in (reading for kind in kinds for reading in kind(device, asked["only"])):
        readings.append(one)
        note = ", ".join(filter(None, (one.rate, one.share, asked["note"])))
        row = about | {"step_seconds": f"{one.seconds:.8f}", "note": note, "settings": f"name={one.name}"}
        write_row(row, asked["results"])
    print(f"\n{'name':40} {'ms':>9} {'rate':>14}  share")
    for one in readings:
        print(f"{one.name:40} {1000 * one.seconds:9.4f} {one.rate:>14}  {one.share}")


def memory_readings(device: torch.device, only: str) -> Iterator[Reading]:
    """What the cases move, beside a copy."""
    (name, call, size), *_ = copies(device)
    copied = size / seconds(call, burst(size))
    if only in name:
        yield Reading(name, size / copied, f"{copied / 1e9:.0f} GB/s", "1.000 of copy")
    for name, call, size in cases(device):
        taken = attempt(name, call, burst(size)) if only in name else None
        if taken is not None:
            rate = size / taken
            yield Reading(name, taken, f"{rate / 1e9:.0f} GB/s", f"{rate / copied:.3f} of copy")


def product_readings(device: torch.device, only: str) -> Iterator[Reading]:
    """What products reach, beside bf16 at their shape."""
    for shape, (outputs, inputs) in PRODUCTS.items():
        names = [f"{kind} {shape}" for kind in KINDS]
        if not any(only in name for name in names):
            continue
        work, bf16 = 2 * TOKENS * outputs * inputs, None
        for name, kind in zip(names, KINDS.values(), strict=True):
            first = name == names[0]
            taken = attempt(name, kind(device, outputs, inputs), 4) if only in name or first else None
            bf16 = taken if first else bf16
            if taken is not None and only in name:
                share = f"{bf16 / taken:.3f} of bf16" if bf16 is not None else ""
                yield Reading(name, taken, f"{work / taken / 1e12:.0f} TFLOP/s", share)


def cases(device: torch.device) -> Iterator[Case]:
    """Every kernel that waits for memory."""
    for section in SECTIONS:
        yield from section(device)


def copies(device: torch.device) -> Iterator[Case]:
    """What all else is held against."""
    there = [torch.empty(2**28, dtype=torch.uint8, device=device) for _ in range(2)]
    yield "copy", lambda: there[0].copy_(there[1]), 2**29


def nf4_cases(device: torch.device) -> Iterator[Case]:
    """NF4 with double quantisation to each of the forms that products want."""
    for shape in WEIGHTS:
        parts = nf4.quantise(torch.randn(shape, device=device) * 0.02)
        count, held = shape[0] * shape[1], sum(part.numel() for part in parts)
        w_scale, title = fp8.nf4_weight_scale(*parts, shape), f"{shape[0]}x{shape[1]}"
        forms: dict[str, tuple[Call, int]] = {
            "bf16": (partial(nf4.dequantise, shape=shape, dtype=torch.bfloat16), 2 * count),
            "fp8 [O,I]": (partial(fp8.nf4_to_fp8, shape=shape, w_scale_O=w_scale, transposed=False), count),
            "fp8 [I,O]": (partial(fp8.nf4_to_fp8, shape=shape, w_scale_O=w_scale, transposed=True), count),
        }
        for form, (call, made) in forms.items():
            yield f"nf4 to {form} {title}", rotated(call, *parts), held + made


def fp8_cases(device: torch.device) -> Iterator[Case]:
    """Activations and dense weights to 8 bits."""
    for width in (4096, 11008, 22016):
        x_TK = torch.randn(TOKENS, width, device=device).bfloat16()
        yield f"quantise_rows {TOKENS}x{width}", rotated(fp8.quantise_rows, x_TK), 3 * x_TK.numel()
    w_OI = torch.randn(11008, 4096, device=device).bfloat16()
    for transposed in (False, True):
        call = partial(fp8.dense_to_fp8, w_scale_O=fp8.weight_scale(w_OI), transposed=transposed)
        layout = "[I,O]" if transposed else "[O,I]"
        yield f"bf16 to fp8 {layout} 11008x4096", rotated(call, w_OI), 3 * w_OI.numel()


def rope_cases(device: torch.device) -> Iterator[Case]:
    """Rotation with LoRA of rank 16, of Llama-2-7B's heads and of Llama-3.1-8B's."""
    frequencies = tuple(10000 ** (-i / 64) for i in range(64))
    table = rotary_table(torch.arange(TOKENS, device=device) % 2048, frequencies)
    for heads in (Heads(32, 32, 128), Heads(32, 8, 128)):
        sizes = [count * heads.width for count in (heads.queries, heads.keys, heads.keys)]
        Bs = tuple(torch.randn(size, 16, device=device).bfloat16() * 0.01 for size in sizes)
        qkv, xa = (torch.randn(TOKENS, size, device=device).bfloat16() for size in (sum(sizes), 48))
        w_scale, size, title = torch.rand(sum(sizes), device=device), 2 * qkv.numel(), f"{TOKENS}x{sum(sizes)}"
        call = partial(rope, xa=xa, Bs=Bs, bias=None, table=table, heads=heads)
        yield f"rope {title}", rotated(call, qkv), 2 * size
        parts = [part.contiguous() for part in qkv.unflatten(1, (-1, heads.width)).split(heads[:2] + heads[1:2], dim=1)]
        for form, scale, moved in (("", None, 2 * size), (" and fp8", w_scale, 2 * size + size // 2)):
            call = partial(rope_backward, table=table, Bs=Bs, w_scale=scale)
            yield f"rope backward{form} {title}", rotated(call, *parts), moved


def head_cases(device: torch.device) -> Iterator[Case]:
    """A chunk of logits of Llama-2-7B and of Llama-3.1-8B: what they say of targets, and their gradient over them."""
    for shape in ((1024, 32000), (512, 128256)):
        logits_KV = torch.randn(shape, device=device)
        targets_K, title = torch.randint(0, shape[1], shape[:1], device=device), f"{shape[0]}x{shape[1]}"
        for form, wanted, moved in (("read", False, 4), ("read and gradient", True, 6)):
            call = partial(read_rows, targets_K=targets_K, softcap=None, dtype=torch.bfloat16, wants_gradient=wanted)
            yield f"logits {form} {title}", rotated(call, logits_KV), moved * logits_KV.numel()


def add_norm_cases(device: torch.device) -> Iterator[Case]:
    """Addition and norm at width 4,096, with LoRA of rank 16 on the layer before and on three behind, or none."""
    shapes = {"x": (TOKENS, 4096), "B": (4096, 16), "A": (48, 4096), "xa": (TOKENS, 16), "dha": (TOKENS, 48)}
    x, B, A, xa, dha = (torch.randn(shape, device=device).bfloat16() for shape in shapes.values())
    y, size, gain, w_scale = x.clone(), x.numel(), Gain(x[0].clone(), 1e-5, 0.0), torch.rand(4096, device=device)
    for lora, eight in itertools.product((True, False), (True, False)):
        low = (xa, B) if lora else (None, None)
        name, wanted = f"{' and LoRA' if lora else ''}{' to fp8' if eight else ''} {TOKENS}x4096", 1 if eight else 2
        made = add_norm(x, y, *low, gain, A if lora else None, fp8=eight)
        call = partial(add_norm, xa_TR=low[0], B_DR=low[1], gain=gain, A_RD=A if lora else None, fp8=eight)
        yield f"add_norm{name}", rotated(call, x, y), (6 + wanted) * size
        behind = {"dha": dha, "A": A, "B": B} if lora else {}
        given = NormBackward(x, made.x, made.rstd, **behind, w_scale=w_scale if eight else None)
        call = partial(_norm_backward, given, gain)
        yield f"add_norm backward{name}", rotated(call, x, made.x, y), (8 + eight) * size
        if not lora:
            call = partial(norm_again, rstd_T=made.rstd, gain=gain, fp8=eight)
            yield f"norm_again{name}", rotated(call, x), (2 + wanted) * size


def _norm_backward(given: NormBackward, gain: Gain, *parts: Tensor) -> object:
    dh, x, dx_new = parts
    return add_norm_backward(given._replace(dh=dh, x=x, dx_new=dx_new), gain, wants_weight=False)


def gate_cases(device: torch.device) -> Iterator[Case]:
    """The gate of Llama-2-7B, with LoRA of rank 16 around it or none; in place backward, on its own results."""
    inner = 11008
    shapes = {"xa": (TOKENS, 32), "Bg": (inner, 16), "Bu": (inner, 16), "A_down": (16, inner), "dha": (TOKENS, 16)}
    low = {name: torch.randn(shape, device=device).bfloat16() for name, shape in shapes.items()}
    gu, dh = (torch.randn(TOKENS, width, device=device).bfloat16() for width in (2 * inner, inner))
    w_scale, size = torch.rand(2 * inner, device=device), dh.numel()
    for lora, eight in itertools.product((True, False), (True, False)):
        name = f"{' and LoRA' if lora else ''}{' to fp8' if eight else ''} {TOKENS}x{inner}"
        given = GateBackward(dh, gu, **(low if lora else {}), w_scale=w_scale if eight else None)
        call = partial(gate, xa_TR=given.xa, Bg_IR=given.Bg, Bu_IR=given.Bu, A_down_RI=given.A_down)
        yield f"gate{name}", rotated(partial(call, activation="silu", fp8=eight), gu), (5 if eight else 6) * size
        yield f"gate backward{name}", rotated(partial(_gate_backward, given), dh, gu), (14 if eight else 12) * size


def _gate_backward(given: GateBackward, dh: Tensor, gu: Tensor) -> object:
    return gate_backward(given._replace(dh=dh, gu=gu), "silu")


def outer_cases(device: torch.device) -> Iterator[Case]:
    """Gradients of low-rank matrices, those of joint layers at once: x is read once."""
    for widths, rank in (((4096,), 16), ((4096,), 48), ((11008,), 16), ((4096,) * 3, 16), ((11008,) * 2, 16)):
        sizes = (sum(widths), rank * len(widths))
        x_TN, z_TK = (torch.randn(TOKENS, size, device=device).bfloat16() for size in sizes)
        call = rotated(partial(outer, widths=widths), x_TN, z_TK)
        yield f"outer {TOKENS}x{'+'.join(map(str, widths))}x{rank}", call, 2 * (x_TN.numel() + z_TK.numel())


def adam_cases(device: torch.device) -> Iterator[Case]:
    """The norm and the step of AdamW: over the LoRA of Llama-2-7B, 448 tensors, and over full weights."""
    linears = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)]
    factors = [shape for out, inputs in linears for shape in ((16, inputs), (out, 16))] * 32
    for title, shapes, dtype, kind in (
        ("LoRA", factors, torch.float32, "adamw"),
        ("full", WEIGHTS, torch.float32, "adamw"),
        ("full16", WEIGHTS, torch.bfloat16, "adamw"),
        ("full16", WEIGHTS, torch.bfloat16, "adamw8bit"),
    ):
        weights = {str(i): nn.Parameter(torch.zeros(shape, device=device).to(dtype)) for i, shape in enumerate(shapes)}
        optimizer = adamw(weights, 1e-4, (0.9, 0.999), 1e-8, 0.0, kind)
        assert isinstance(optimizer, AdamW)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, device=device).to(dtype)
        count, scale = sum(weight.numel() for weight in weights.values()), torch.ones((), device=device)
        [launch] = optimizer.launches()
        # Weights and states are read and written, gradients read.
        moved = count * (3 * dtype.itemsize + (4 if kind == "adamw8bit" else 16))
        yield f"{kind} {title}", partial(launch.update, scale, 0), moved
        if kind == "adamw":
            yield f"gradient norm {title}", launch.squares, count * dtype.itemsize


def bf16_product(device: torch.device, outputs: int, inputs: int) -> Call:
    """x Wᵀ in bf16."""
    x_TK = torch.randn(TOKENS, inputs, device=device).bfloat16()
    w_OK = torch.randn(outputs, inputs, device=device).bfloat16()
    return lambda: x_TK @ w_OK.t()


def fp8_product(fast: bool, device: torch.device, outputs: int, inputs: int) -> Call:
    """The same in e4m3, scaled by rows."""
    x8, w8 = (fp8.quantise_rows(torch.randn(rows, inputs, device=device).bfloat16()) for rows in (TOKENS, outputs))
    scales = (x8.scale.unsqueeze(1), w8.scale.unsqueeze(0))
    return lambda: torch.ops.aten._scaled_mm(
        x8.values, w8.values.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def int8_product(scaled: bool, device: torch.device, outputs: int, inputs: int) -> Call:
    """The same in int8: sums in int32, and where `scaled` the pass that makes bf16 of them."""
    x_TK, w_OK = (torch.randint(-127, 128, (rows, inputs), device=device).to(torch.int8) for rows in (TOKENS, outputs))
    scales = (torch.rand(TOKENS, 1, device=device), torch.rand(1, outputs, device=device))
    finish = torch.compile(_rescale, dynamic=True) if scaled else lambda sums, *_: sums
    return lambda: finish(torch._int_mm(x_TK, w_OK.t()), *scales)


def _rescale(sums_TO: Tensor, scale_T1: Tensor, scale_1O: Tensor) -> Tensor:
    return (sums_TO * scale_T1 * scale_1O).bfloat16()


KINDS: dict[str, Callable[[torch.device, int, int], Call]] = {
    "bf16": bf16_product,
    "fp8 fast": partial(fp8_product, True),
    "fp8 exact": partial(fp8_product, False),
    "int8 sums": partial(int8_product, False),
    "int8 scaled": partial(int8_product, True),
}
"""The first is what the others are a share of."""
SECTIONS: tuple[Callable[[torch.device], Iterator[Case]], ...] = (
    nf4_cases,
    fp8_cases,
    add_norm_cases,
    rope_cases,
    head_cases,
    gate_cases,
    outer_cases,
    adam_cases,
)
"""One function for each file of kernels; add yours."""


if __name__ == "__main__":
    try:
        main(read(sys.argv[1:], WORDS, {}, ()))
    except ValueError as error:
        sys.exit(f"benchmarks/kernels.py: {error}")
