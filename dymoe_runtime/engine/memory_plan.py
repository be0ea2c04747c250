"""The memory budget of a run, from what each part needs."""

from __future__ import annotations

from dymoe_runtime.bundle.bundle import DENSE, LOOK_AHEAD, TOKENIZER, Bundle
from dymoe_runtime.engine.budget import CHUNK, Budget
from dymoe_runtime.errors import DymoeError
from dymoe_runtime.kernels.interface import Kernels
from dymoe_runtime.model.decoder import Decoder
from dymoe_runtime.model.score import SCORED_ROWS
from dymoe_runtime.model.state import SequenceState
from dymoe_runtime.process import machine_limit, memory_limit, release_code, resident_bytes
from dymoe_runtime.spec import ModelSpec
from dymoe_runtime.store.arena import full_arena_bytes, min_arena_bytes
from dymoe_runtime.units import format_size

# Python and its libraries hold 37 MiB once a run has loaded them. The rest allows for variation between runs, by how
# much of their files is in the page cache. The minimum memory counts this, or more if more is measured.
PROCESS_BYTES = 44 << 20
# What the libraries of a server, which runs several sequences, hold beside that: 5 MiB were measured.
SERVER_BYTES = 8 << 20
# Memory of a tokenizer as a multiple of its file's size; 7.3 to 7.8 were measured.
TOKENIZER_FACTOR = 8
# The most sequences of a batch by default, and the share of the memory that their states may take then.
MOST_SEQUENCES, SEQUENCES_SHARE = 4, 1 / 8
# Arrays of logits for each sequence of a batch: the head's result, a copy of it, and those of its last prompt.
LOGITS_OF_EACH = 3


def plan_budget(
    bundle: Bundle,
    kernels: Kernels,
    context: int,
    memory_bytes: int | None = None,
    uncounted_bytes: int = 0,
    process_bytes: int | None = None,
    window: int | None = None,
    kv_bits: int = 16,
    sequences: int | None = None,
) -> Budget:
    """Return the division of `memory_bytes`, by default all memory that this process may use.

    The budget has room for a sequence of `context` tokens or, if `window` is given, for separate windows of that many
    tokens. With `sequences`, it has room for so many of them, which are decoded together, also while a prompt runs.
    `process_bytes` is the memory of the process itself, by default its resident set less `uncounted_bytes`.
    """
    tokenizer = bundle.manifest.files.get(TOKENIZER)
    floor_process_bytes = PROCESS_BYTES + (TOKENIZER_FACTOR * tokenizer.nbytes if tokenizer else 0)
    if sequences is not None:
        floor_process_bytes += SERVER_BYTES
    spec, layout = bundle.spec, bundle.layout
    workspace = Decoder.workspace_bytes(spec, kernels, window or CHUNK, window or context)
    if window:  # logits, logits less their maximum, and exponentials, float32 each
        workspace += 3 * 4 * min(SCORED_ROWS, window) * spec.vocab_size
    if process_bytes is None:
        release_code()
        process_bytes = resident_bytes() - uncounted_bytes
        floor_process_bytes = max(floor_process_bytes, process_bytes)
    one_token = Decoder.workspace_bytes(spec, kernels, 1, context) + kernels.kept_bytes(
        CHUNK, spec.expert_width, _widest(spec)
    )
    state_bytes = SequenceState.bytes_needed(spec, window or context, kv_bits, shared=bool(window))
    if sequences is not None:
        kept = one_token - Decoder.workspace_bytes(spec, kernels, 1, context)
        one_token = Decoder.workspace_bytes(spec, kernels, sequences, context) + kept
        one_token += LOGITS_OF_EACH * 4 * sequences * spec.vocab_size
        workspace += one_token - kept
        state_bytes = sequences * sequence_bytes(spec, context, kv_bits)
    return Budget(
        memory_bytes=memory_limit() if memory_bytes is None else memory_bytes,
        process_bytes=process_bytes,
        floor_process_bytes=floor_process_bytes,
        dense_bytes=bundle.manifest.files[DENSE].nbytes + 2 * bundle.manifest.files[LOOK_AHEAD].nbytes,
        state_bytes=state_bytes,
        workspace_bytes=workspace + kernels.reserve_bytes,
        min_arena_bytes=min_arena_bytes(layout, spec.total_experts),
        full_arena_bytes=full_arena_bytes(layout, spec.total_experts),
        chunk_bytes=Decoder.chunk_bytes(spec, CHUNK),
        spare_bytes=0 if window else max(0, workspace - one_token),
    )


def sequence_bytes(spec: ModelSpec, context: int, kv_bits: int) -> int:
    """Return the bytes of one of the sequences of a batch: its state, and a snapshot of what of it cannot be cut."""
    return SequenceState.bytes_needed(spec, context, kv_bits) + SequenceState.bytes_needed(spec, 0, kv_bits)


def sequences_that_fit(bundle: Bundle, kernels: Kernels, context: int, kv_bits: int, memory_bytes: int) -> int:
    """Return how many sequences a batch has by default: MOST_SEQUENCES, or as many as take SEQUENCES_SHARE of memory.

    It is at least 1, also if that does not fit either.
    """
    each = sequence_bytes(bundle.spec, context, kv_bits)
    for count in range(MOST_SEQUENCES, 1, -1):
        budget = plan_budget(bundle, kernels, context, memory_bytes, kv_bits=kv_bits, sequences=count)
        if count * each <= SEQUENCES_SHARE * memory_bytes and budget.floor_bytes <= memory_bytes:
            return count
    return 1


def check_memory(memory_bytes: int) -> None:
    """Raise DymoeError if a budget exceeds the memory that this process can ever have."""
    limit = machine_limit()
    if memory_bytes > limit:
        raise DymoeError(
            f"--memory {format_size(memory_bytes)} is more than the {format_size(limit)} that this process may have "
            "by its machine or its cgroup; give less, or raise the limit"
        )


def _widest(spec: ModelSpec) -> int:
    """Return the columns of the widest matrix, which is the width of the widest quantized activation."""
    return max(spec.expert_width, *(shape[1] for _, shape in spec.each_tensor() if len(shape) == 2))
