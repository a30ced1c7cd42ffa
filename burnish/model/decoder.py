"""The packed decoder: what the rest of the program sees of a model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from burnish.model.blocks import Attend, Block, Embedding, Norm, Pass, SelfAttention, Weights
from burnish.model.cache import Cache
from burnish.model.families import DecoderConfig
from burnish.model.fused import FusedBlocks, supported
from burnish.model.linear import Linear
from burnish.model.shelf import Plan, keep_everything
from burnish.model.storage import Dense, lay_in_one_piece
from burnish.ops.attention import packed_layout, rotary_table, wants_padding
from burnish.ops.log_probs import chunk_rows, head_logits, target_log_probs
from burnish.ops.pointwise import soft_cap
from burnish.types import Batch

LEAN_LOGITS = 1 << 25
"""Logits held at a time on a GPU at the least memory: 128 MiB."""
MAX_GRAPHS = 64
"""Of the decoder block, for all the ways in which it is called."""


class Scores(NamedTuple):
    """How a model reads a batch, position by position; 0 and False where the batch's weight is 0."""

    log_probs: Float[Tensor, " T"]
    """The log-probability of each target, in fp32, differentiable."""
    correct: Bool[Tensor, " T"]
    """Whether the target was the most probable token."""


class Trunk(nn.Module):
    """Everything below the head."""

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        embedding = weights.parameter("model.embed_tokens.weight", shape)
        self.embed_tokens = Embedding(embedding, config.embedding_scale)
        self.layers = nn.ModuleList(_block(config, index, weights) for index in range(len(config.layers)))
        self.norm = Norm(weights.parameter("model.norm.weight", (config.hidden_size,)), config)


def _block(config: DecoderConfig, index: int, weights: Weights) -> Block:
    block = Block(config, index, weights)
    lay_in_one_piece(block)
    return block


class Decoder(nn.Module):
    """A language model over packed batches. `adapter` names which of its adapters changes it, call by call.

    Activations are in `dtype`, norms and probabilities in fp32. Set `checkpointing` to recompute each block in the
    backward pass instead of keeping what it computed.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.checkpointing = False
        self.compiled = False
        self.fused: FusedBlocks | None = None
        self.plan: Plan = keep_everything(len(config.layers))
        self.planner: Callable[[float], Plan] | None = None
        """Gives the plan for batches that read so many keys a token, where prompts are shared.

        The first pass with gradients makes it its own, or the first one `in_training`, when all else is on the device:
        so what a first step asks a reference is computed as in later ones.
        """
        self.in_training = False
        self.model = Trunk(config, weights)
        if config.tied:
            self.lm_head = Linear(_share(self.model.embed_tokens.weight))
        else:
            self.lm_head = weights.linear("lm_head", (config.vocab_size, config.hidden_size), bias=False)
        self.heads = nn.ModuleDict()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device  # the embedding may be on the host

    def score(self, batch: Batch, adapter: str | None = None, temperature: float = 1.0) -> Scores:
        """Log-probability of each scored target, and whether it came first. Only scored positions meet the head.

        The probabilities are those of the logits divided by `temperature`.
        """
        hidden_KD = self.hidden(batch, adapter).index_select(0, batch.scored)
        targets_K = batch.targets[batch.scored]
        log_probs_K, correct_K = self._score_rows(hidden_KD, targets_K, adapter, temperature)
        zeros_T, false_T = (part.new_zeros(batch.tokens.shape) for part in (log_probs_K, correct_K))
        return Scores(zeros_T.index_copy(0, batch.scored, log_probs_K), false_T.index_copy(0, batch.scored, correct_K))

    def log_probs(self, batch: Batch, adapter: str | None = None, temperature: float = 1.0) -> Float[Tensor, " T"]:
        """The log-probability of each scored target."""
        return self.score(batch, adapter, temperature).log_probs

    def hidden(self, batch: Batch, adapter: str | None = None) -> Float[Tensor, "T D"]:
        """The last hidden state of each position, after the final norm."""
        return self._run(batch.tokens, self._packed(batch), adapter)

    def values(self, batch: Batch, head: str, adapter: str | None = None) -> Float[Tensor, " T"]:
        """What one of the model's heads reads at each position, in fp32: rewards, or values of states."""
        return self.heads[head](self.hidden(batch, adapter))

    def logits(self, batch: Batch, adapter: str | None = None) -> Float[Tensor, "T V"]:
        """The logits of every position, in fp32: T · V numbers at once, for small batches."""
        return self._logits(self.hidden(batch, adapter), adapter)

    def new_cache(self, num_slots: int, max_tokens: int) -> Cache:
        """An empty cache for so many sequences of so many tokens, prompt and answer together."""
        if self.fused is not None:
            self.fused.release()
        return Cache(self.config, num_slots, max_tokens, self.device, self.dtype)

    @torch.no_grad()
    def prefill(
        self, batch: Batch, cache: Cache, adapter: str | None = None, slots: Int[Tensor, " S"] | None = None
    ) -> Float[Tensor, "S V"]:
        """The logits after the last token of each sequence; sequence s of the batch now fills slot `slots[s]`, or s."""
        assert not batch.prefixes
        slots_S = torch.arange(batch.num_sequences, device=batch.tokens.device) if slots is None else slots
        cache.aim(slots_S[batch.sequence], batch.positions, batch.longest)
        with self._eager():
            hidden_TD = self._run(batch.tokens, self._packed(batch, cache), adapter)
        ends_S = batch.starts[1:].long()
        cache.fill(slots_S, ends_S - batch.starts[:-1])
        return self._logits(hidden_TD[ends_S - 1], adapter)

    @torch.no_grad()
    def decode(self, tokens_S: Int[Tensor, " S"], cache: Cache, adapter: str | None = None) -> Float[Tensor, "S V"]:
        """The logits after one more token in each slot in use."""
        places_S = cache.aim_next()
        with self._eager():
            hidden_SD = self._run(tokens_S, Pass(self._tables(places_S), None, cache), adapter)
        cache.advance()
        return self._logits(hidden_SD, adapter)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the decoder block; blocks of one kind share what is compiled."""
        from torch._dynamo import config  # a second of imports

        # A graph for each adapter, with gradients and without, with shared prompts and without: the default of 8 is
        # soon reached, and what comes after it would run uncompiled.
        config.recompile_limit = MAX_GRAPHS
        padded = self._padded()
        for layer in self.model.layers:
            if padded:
                # Padded rows differ from batch to batch: as part of the graph they would compile it anew for each.
                attention = cast(SelfAttention, layer.self_attn)
                attention.attend = cast(Attend, torch.compiler.disable(attention.attend))
            layer.compile(backend=backend)
        self.compiled = True

    def fuse_blocks(self, fp8: bool = False) -> bool:
        """Run the blocks by hand from now on wherever that can be (`model/fused.py`); whether this decoder's can."""
        if supported(self.config):
            blocks = [cast(Block, layer) for layer in self.model.layers]
            self.fused = FusedBlocks(blocks, self.model.norm, self.config, fp8)
        return self.fused is not None

    def follow(self, plan: Plan) -> None:
        """Let blocks that are run by hand go by this plan from now on; an embedding on the host stays there."""
        assert self.fused is not None
        self.plan = plan
        self.fused.hold_decoded(plan.dense_blocks)
        if plan.embedding_on_host:
            self.model.embed_tokens.to_host()

    def takes(self, adapter: str | None) -> bool:
        """Whether the blocks run by hand with this adapter, in training too."""
        return self.fused is not None and self.fused.takes(adapter, training=True)

    def prepare(self, adapter: str | None) -> None:
        """Make ready what the next pass with this adapter would make ready first: for when weights have changed."""
        if self.fused is not None and self.fused.takes(adapter, self.training):
            self.fused.prepare(adapter, self.dtype)

    def _run(self, tokens_T: Tensor, given: Pass, adapter: str | None) -> Tensor:
        hidden_TD = self.model.embed_tokens(tokens_T, self.dtype)
        if self.fused is not None and given.cache is None and self.fused.takes(adapter, self.training):
            if self.planner is not None and (self.in_training or torch.is_grad_enabled()):
                keys = 0.0 if given.layout is None or given.layout.keys is None else len(given.layout.keys.position)
                plan, self.planner = self.planner(keys / len(tokens_T)), None
                self.follow(plan)
            return self.fused(hidden_TD, given, adapter, self.plan)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                hidden_TD = checkpoint(layer, hidden_TD, given, adapter, use_reentrant=False)
            else:
                hidden_TD = layer(hidden_TD, given, adapter)
        return self.model.norm(hidden_TD)

    def _packed(self, batch: Batch, cache: Cache | None = None) -> Pass:
        return Pass(self._tables(batch.positions), packed_layout(batch, self._padded()), cache)

    def _padded(self) -> bool:
        return wants_padding(self.device, self.dtype, self.config.head_dim, self.config.attention_softcap)

    def _tables(self, positions_T: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(rotary_table(positions_T, rope.frequencies, rope.scale) for rope in self.config.ropes)

    def _logits(self, hidden_KD: Tensor, adapter: str | None) -> Tensor:
        if adapter is not None and adapter in self.lm_head.adapters:
            return soft_cap(self.lm_head(hidden_KD, adapter).float(), self.config.final_softcap)
        return head_logits(hidden_KD, self.lm_head.weight.dense(hidden_KD.dtype), self.config.final_softcap)

    def _score_rows(
        self, hidden_KD: Tensor, targets_K: Tensor, adapter: str | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        cap = self.config.final_softcap
        if temperature != 1:  # cap · tanh(z / cap) / t = (cap / t) · tanh((z / t) / (cap / t))
            hidden_KD, cap = hidden_KD / temperature, None if cap is None else cap / temperature
        if adapter is None or adapter not in self.lm_head.adapters:
            head_VD = self.lm_head.weight.dense(hidden_KD.dtype)
            return target_log_probs(hidden_KD, head_VD, targets_K, cap, self._chunk())
        parts = [
            checkpoint(self._score_adapted, hidden_KD[rows], targets_K[rows], adapter, cap, use_reentrant=False)
            for rows in chunk_rows(len(targets_K), self.config.vocab_size, hidden_KD.device, self._chunk())
        ]
        log_probs = [targets_K[:0].float(), *(part[0] for part in parts)]
        return torch.cat(log_probs), torch.cat([targets_K[:0].bool(), *(part[1] for part in parts)])

    def _score_adapted(
        self, hidden_KD: Tensor, targets_K: Tensor, adapter: str, cap: float | None
    ) -> tuple[Tensor, Tensor]:
        """The same for a head with an adapter, a few rows at a time."""
        logits_KV = soft_cap(self.lm_head(hidden_KD, adapter).float(), cap)
        log_probs_K = logits_KV.log_softmax(-1).gather(1, targets_K[:, None])[:, 0]
        return log_probs_K, logits_KV.argmax(-1) == targets_K

    def _chunk(self) -> int | None:
        """How many logits are held at a time, where memory counts for more than time."""
        return LEAN_LOGITS if self.checkpointing and self.device.type == "cuda" else None

    def _eager(self) -> AbstractContextManager[object]:
        """Generation runs uncompiled: its shapes change with every token."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()


def _share(embedding: nn.Parameter) -> Dense:
    """A stored weight that is the embedding matrix itself: one parameter, used twice."""
    stored = Dense(embedding.detach(), embedding.requires_grad)
    stored.weight = embedding
    return stored
