"""The top-level keys of a DeepSpeed configuration: which a run may use, and which dsft refuses."""

TOP_LEVEL_KEYS = frozenset(
    {
        "aio",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "prescale_gradients",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Keys of a DeepSpeed 0.19 file that a run may use. DeepSpeed ignores a key it does not know, so that a misspelt
``zero_optimisation`` would train without ZeRO; here it is an error."""

_DATA = "dsft decides which documents a step trains on; use the data section of the YAML (data.stages for a curriculum)"
REFUSED_KEYS = {
    "optimizer": "dsft makes the optimizer (AdamW, decay for matrices only); set train.lr, betas, eps and weight_decay",
    "scheduler": "dsft sets the learning rate, in steps or in tokens; set train.schedule in the YAML",
    "bfloat16": "this is the old name; write bf16",
    "amp": "model.dtype in the YAML decides the precision",
    "torch_autocast": "model.dtype in the YAML decides the precision",
    "activation_checkpointing": "Hugging Face models ignore it; set model.activation_checkpointing in the YAML",
    "data_efficiency": _DATA,
    "curriculum_learning": _DATA,
    "autotuning": "dsft does not run under DeepSpeed's autotuner",
    "hybrid_engine": "dsft does not train with reinforcement learning",
    "pipeline": "dsft has no pipeline parallelism",
    "tensor_parallel": "dsft has no tensor parallelism",
    "expert_parallel": "dsft has no expert parallelism",
    "sequence_parallel_size": "dsft has no sequence parallelism",
}
"""Keys that a run may not use, and why."""
