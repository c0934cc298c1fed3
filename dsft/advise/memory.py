"""Memory of a training run by part and place, from the sizes of its model and DeepSpeed's configuration.

The sizes are those of the buffers that DeepSpeed 0.19.8 allocates (``zero/stage_1_and_2.py``, ``zero/stage3.py``) and
dsft's head (``ops/linear_cross_entropy.py``); ``benchmarks/estimate.py`` compares their sum with measured peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsft.advise.shape import ModelShape

Place = Literal["device", "host", "nvme"]

CUDA_RESERVE_BYTES = 2 * 10**9
"""CUDA context, cuBLAS and NCCL buffers of a device, and what its allocator loses between blocks: an assumption."""
CPU_PROCESS_BYTES = 200 * 2**20
"""What a process grows by after its imports and before there is a model: process group, tokenizer, model classes."""
HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc serves smaller blocks from its heap once one of them was freed (DEFAULT_MMAP_THRESHOLD_MAX of mallopt(3)), and
the heap keeps what is freed below its top."""
HEAP_COPIES = 1
"""Copies of the weights that the heap of a CPU process keeps in freed blocks. The flat buffers free one copy, and each
backward pass frees gradients; how much of it the heap can give back depends on what lies above it. Runs of
``benchmarks/estimate.py`` kept between none and two copies, the same case by up to one more or less."""
LOGITS_BYTES = 256 * 2**20
"""fp32 logits that dsft's head holds at once (``ops/linear_cross_entropy.py``)."""
_DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Settings:
    """What of a run decides its memory beside the model.

    Attributes:
        dtype_bytes: of a weight. checkpointing: activations are recomputed.
        micro_batch_tokens: tokens of one forward on a rank. supervised_share: of them, those that reach the head.
        zero: the ``zero_optimization`` block of the resolved DeepSpeed configuration.
        accumulation_bytes, communication_bytes: of a gradient that is summed, and that is sent.
        num_ranks, ranks_per_host: devices in all, and of one host.
        on_cpu: the ranks compute on the CPU, so that device and host memory are one.
    """

    dtype_bytes: int
    checkpointing: bool
    micro_batch_tokens: int
    supervised_share: float
    zero: Mapping[str, Any]
    accumulation_bytes: int
    communication_bytes: int
    num_ranks: int
    ranks_per_host: int
    on_cpu: bool

    @property
    def stage(self) -> int:
        """ZeRO stage, 1 to 3."""
        return int(self.zero["stage"])

    def place_of(self, block: Literal["offload_optimizer", "offload_param"]) -> Place:
        """Where a block of the configuration puts its part."""
        device = (self.zero.get(block) or {}).get("device", "none")
        return {"none": "device", "cpu": "host", "nvme": "nvme"}[device]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table: bytes a rank.

    Attributes:
        when: ``always``, in the ``backward`` pass, or in the optimizer ``step``.
    """

    name: str
    place: Place
    num_bytes: int
    when: Literal["always", "backward", "step"] = "always"


@dataclass(frozen=True, slots=True)
class Memory:
    """All parts, of one rank; on a CPU ``device`` is the share of a rank in its host's memory."""

    parts: tuple[Part, ...]
    ranks_per_host: int
    on_cpu: bool

    def peak(self, place: Place) -> int:
        """Bytes at the worst moment: of a device, of a host (all its ranks), of a host's disks."""
        here = [p for p in self.parts if p.place == place or (self.on_cpu and {p.place, place} <= {"device", "host"})]
        total = {when: sum(p.num_bytes for p in here if p.when == when) for when in ("always", "backward", "step")}
        peak = total["always"] + max(total["backward"], total["step"])
        return peak if place == "device" else peak * self.ranks_per_host


def settings_of(deepspeed_config: Mapping[str, Any], *, dtype: str, **other: Any) -> Settings:
    """Settings from a resolved DeepSpeed configuration (``dsft.config.deepspeed``) and the other fields."""
    size = _DTYPE_BYTES[dtype]
    accumulation = (deepspeed_config.get("data_types") or {}).get("grad_accum_dtype")
    communication = deepspeed_config.get("communication_data_type")
    return Settings(
        dtype_bytes=size,
        zero=deepspeed_config["zero_optimization"],
        accumulation_bytes=_DTYPE_BYTES.get(str(accumulation), size),
        communication_bytes=_DTYPE_BYTES.get(str(communication), size),
        **other,
    )


def memory_of(shape: ModelShape, settings: Settings) -> Memory:
    """Every part that a rank holds."""
    parts = [*(_zero3(shape, settings) if settings.stage == 3 else _zero12(shape, settings))]
    if settings.on_cpu:
        in_heap = sum(n for n in shape.parameter_sizes if n * settings.dtype_bytes < HEAP_BLOCK_BYTES)
        freed = HEAP_COPIES * in_heap * settings.dtype_bytes
        # ZeRO-3 gathers the weights in use into these blocks, so in the backward pass they are not free.
        parts.append(Part("process: freed blocks", "device", freed, "step" if settings.stage == 3 else "always"))
    parts += _activations(shape, settings)
    parts.append(Part("process", "device", CPU_PROCESS_BYTES if settings.on_cpu else CUDA_RESERVE_BYTES))
    return Memory(tuple(part for part in parts if part.num_bytes), settings.ranks_per_host, settings.on_cpu)


def _zero12(shape: ModelShape, settings: Settings) -> list[Part]:
    """ZeRO 1 and 2: whole weights everywhere, optimizer (and with 2 the gradients) in slices."""
    size, trained = settings.dtype_bytes, shape.num_trained
    own = -(-trained // settings.num_ranks)
    place = settings.place_of("offload_optimizer")
    parts = [
        Part("weights", "device", shape.num_parameters * size),
        Part("optimizer: fp32 weights", place, own * 4),
        Part("optimizer: moments", place, own * 8),
    ]
    if place == "device":
        whole = trained if settings.stage == 1 else own
        parts.append(Part("gradients", "device", whole * settings.accumulation_bytes))
        parts.append(Part("step: fp32 gradients", "device", own * 4, "step"))
        parts += _adam_temporaries(own, settings)
    else:
        parts.append(Part("gradients: fp32", place, own * 4))
        parts.append(Part("gradients: accumulated", place, own * size))
        parts.append(Part("weights: buffer", place, own * size))
        parts.append(Part("gradients: in flight", "device", 2 * max(shape.parameter_sizes) * size))
    if settings.stage == 2:
        buckets = 2 if settings.zero.get("overlap_comm") else 1
        bucket = int(settings.zero.get("reduce_bucket_size", 5e8))
        parts.append(Part("communication: buckets", "device", buckets * bucket * settings.communication_bytes))
    return parts


def _zero3(shape: ModelShape, settings: Settings) -> list[Part]:
    """ZeRO 3: everything in slices; the weights in use are gathered."""
    size, zero, ranks = settings.dtype_bytes, settings.zero, settings.num_ranks
    own, own_trained = -(-shape.num_parameters // ranks), -(-shape.num_trained // ranks)
    place, weights_place = settings.place_of("offload_optimizer"), settings.place_of("offload_param")
    parts = [Part("weights: own slice", weights_place, own * size)]
    shared = size == 4 and place == "device" and weights_place == "device"
    if not shared:  # with fp32 weights on the same device DeepSpeed trains the slice itself
        parts.append(Part("optimizer: fp32 weights", place, own_trained * 4))
    parts.append(Part("optimizer: moments", place, own_trained * 8))
    parts.append(Part("gradients: own slice", place, own_trained * settings.accumulation_bytes))
    sub_group = min(own_trained, int(zero.get("sub_group_size", 1e9)))
    if place == "device":
        parts.append(Part("optimizer: gradient buffer", "device", sub_group * 4))
        parts.append(Part("step: fp32 gradients", "device", sub_group * 4, "step"))
        parts += _adam_temporaries(sub_group, settings)
    else:
        parts.append(Part("gradients: fp32", place, own_trained * 4))
    parts.append(Part("communication: weights in use", "device", _gathered(shape, zero) * size, "backward"))
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    parts.append(Part("communication: buckets", "device", bucket * settings.communication_bytes))
    if place == "nvme":
        buffers = int(zero["offload_optimizer"].get("buffer_count", 4))
        parts.append(Part("offload: buffers", "host", buffers * sub_group * 4))
    if weights_place == "nvme":
        offload = zero["offload_param"]
        buffers = int(offload.get("buffer_count", 5)) * int(offload.get("buffer_size", 1e8))
        parts.append(Part("offload: buffers of weights", "host", buffers * size))
    return parts


def _gathered(shape: ModelShape, zero: Mapping[str, Any]) -> int:
    """Elements of weights that are whole at once.

    DeepSpeed keeps what is used again within ``stage3_max_reuse_distance`` elements: around the turn from forward to
    backward that is the last half of it. The small parameters are never given back.
    """
    threshold = int(zero.get("stage3_param_persistence_threshold", 1e5))
    small = sum(size for size in shape.parameter_sizes if size <= threshold)
    reused = int(zero.get("stage3_max_reuse_distance", 1e9)) // 2
    prefetched = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    return min(shape.num_parameters, small + max(reused, shape.largest_layer) + prefetched)


def _adam_temporaries(elements: int, settings: Settings) -> list[Part]:
    """torch.optim.AdamW on the CPU makes a root and a quotient of the whole second moment; on CUDA it is fused."""
    return [Part("step: Adam", "device", elements * 8, "step")] if settings.on_cpu else []


def _activations(shape: ModelShape, settings: Settings) -> list[Part]:
    """What one micro-batch keeps for its backward pass, and what the head and the busiest layer need beside it."""
    tokens = settings.micro_batch_tokens
    kept = shape.checkpointed_bytes_per_token if settings.checkpointing else shape.activation_bytes_per_token
    working = 3 * shape.largest_activation_bytes_per_token  # gradients of the tensors that a layer is computing
    if settings.checkpointing:
        working += shape.layer_bytes_per_token
    rows = round(tokens * settings.supervised_share)
    chunk_rows = max(1, LOGITS_BYTES // (4 * shape.vocab_size))
    logits = min(rows, chunk_rows) * shape.vocab_size * settings.dtype_bytes
    hidden = 2 * rows * shape.hidden_size * settings.dtype_bytes
    # The weight's gradient is summed in fp32 over chunks, and scaled into a copy in the backward pass.
    sum_bytes = settings.dtype_bytes if rows <= chunk_rows else 4
    gradient = shape.head_parameters * (2 * sum_bytes) if shape.head_trained else 0
    return [
        Part("activations", "device", round(tokens * kept), "backward"),
        Part("activations: layer at work", "device", round(tokens * working), "backward"),
        Part("logits", "device", logits + hidden, "backward"),
        Part("logits: gradient of the head", "device", gradient, "backward"),
    ]
