"""Words of MoE_Factorize_Compress's conf/ and of Ray Train that are no option here: what to do instead.

Those that an option stands for are with that option (`mfc=` in sections/). docs/guide_words.md has all of the
first, docs/ray.md those of Ray.
"""

from deepseek_jax.config.option import Word

NOTHING = "nothing to set:"

NO_OPTION = (
    # ---- the loss
    Word(
        ("loss.kl_reduction",),
        f"{NOTHING} the divergence is a mean over the scored tokens of the whole batch of a step, whatever "
        "the accumulation and the devices. `batchmean` there is a mean over each micro-batch, `mean` also "
        "divides by padding, and `sum` grows with the batch",
        ("kl_reduction",),
    ),
    # ---- a cache of the teacher's logits
    Word(
        ("teacher.generation.worker_id", "teacher.generation.total_workers"),
        "`python -m deepseek_jax.distill cache --worker=0/8`: shards of one cache, the same bytes for any "
        "number of workers. There each has a file of its own, which nothing reads",
        ("worker_id", "total_workers"),
    ),
    Word(
        ("teacher.generation.batch_size",),
        "the batch of `python -m deepseek_jax.distill cache`, which its manifest keeps: training from it has "
        "the bits of the teacher itself with that many rows in a call",
    ),
    Word(
        ("teacher.generation.force_regenerate",),
        f"{NOTHING} the command goes on with its cache after the last whole shard, and refuses one of other "
        "data, tokenizer or teacher; remove the folder to make it anew",
        ("force_regenerate",),
    ),
    # ---- data
    Word(
        ("dataset.name", "dataset.config_name", "dataset.split"),
        "`data.path`: files (JSONL, Parquet, text; a folder that the hub's client has downloaded, too)",
        ("dataset_name", "dataset_config_name"),
    ),
    Word(
        ("dataset.streaming", "dataset.streaming_buffer_size", "dataset.streaming_chunk_size"),
        f"{NOTHING} files are read by pieces, in an order that is shuffled over all of them; of a "
        "data set no more than an index is held",
        ("streaming_buffer_size", "streaming_chunk_size"),
    ),
    Word(
        ("dataset.max_samples",),
        "`distill.stages` or `train.steps` end a run; to leave data out, give a shorter file",
        ("max_samples",),
    ),
    Word(
        ("dataset.text_column",),
        f"{NOTHING} the column is found: `text` or `content` of documents, and of examples what "
        "`sft.format` names",
        ("text_column",),
    ),
    Word(
        ("dataset.num_proc", "dataloader_num_workers", "dataloader_pin_memory"),
        f"{NOTHING} text is tokenised by all cores at most once, and batches are read ahead by a thread",
        ("num_proc",),
    ),
    Word(
        ("remove_unused_columns",),
        f"{NOTHING} columns that nothing reads are named before the first step",
    ),
    # ---- evaluation
    Word(
        ("evaluation.per_device_eval_batch_size",),
        f"{NOTHING} held-out batches are micro-batches of training",
        ("per_device_eval_batch_size",),
    ),
    Word(
        (
            "evaluation.eval_dataset.name",
            "evaluation.eval_dataset.config_name",
            "evaluation.eval_dataset.split",
            "evaluation.eval_dataset.max_samples",
        ),
        "`data.eval_fraction` of the training data, by document, at most `eval.batches` of them; other data: "
        "`python -m deepseek_jax.evaluate --text=FILE`",
        ("eval_dataset",),
    ),
    Word(
        ("async_eval.eval_interval", "async_eval.n_gpus_per_model"),
        "`python -m deepseek_jax.evaluate --watch`, on the devices that it is given",
        ("eval_interval",),
    ),
    # ---- devices
    Word(
        ('device_map="auto"', "gpu_ids"),
        f"{NOTHING} a run takes all devices that it sees (CUDA_VISIBLE_DEVICES), and lays teacher and "
        "student out over them by `config.mesh`",
        ("device_map", "gpu_ids"),
    ),
)

RAY = (
    Word(
        ("TorchTrainer(train_func)", "JaxTrainer", "deepspeed.initialize(config=...)"),
        "`python -m deepseek_jax.launch ray ... train.py --config=...`, or "
        "`deepseek_jax.launch.ray.fit([...])`: train.py is the train_func",
        ("train_func", "train_loop_per_worker"),
    ),
    Word(
        ('train_loop_config={"epochs": 3}',),
        "arguments of train.py: `--config.train.epochs=3`",
        ("train_loop_config",),
    ),
    Word(
        ("ScalingConfig(num_workers=8, use_gpu=True)",),
        "`launch ray --num_workers=1 --gpus_per_worker=8`: a worker is a host with all its GPUs, and there a "
        "GPU; num_workers=(4, 8) is `--num_workers=8 --min_workers=4`",
        ("scaling_config", "num_workers", "use_gpu", "resources_per_worker", "ray_num_workers"),
    ),
    Word(
        ("RunConfig(storage_path=..., name=...)",),
        "`launch ray --storage_path=s3://bucket/checkpoints --name=...`: the run is in "
        "STORAGE_PATH/NAME/run, which `--workdir` is elsewhere",
        ("run_config", "storage_path"),
    ),
    Word(
        ("FailureConfig(max_failures=3)",),
        "`launch ray --max_failures=3`; not after a mistake, bad numbers or a signal",
        ("failure_config", "max_failures"),
    ),
    Word(
        ("CheckpointConfig(num_to_keep=3)", 'checkpoint_score_attribute="eval_loss"'),
        "`checkpoint.keep=3`, `checkpoint.keep_best=1`",
        ("checkpoint_config", "num_to_keep", "checkpoint_score_attribute"),
    ),
    Word(
        ('ray.train.torch.prepare_model(parallel_strategy="fsdp")', "prepare_data_loader"),
        f"{NOTHING} `sharding.strategy` and `config.mesh` say how the model is divided",
        ("prepare_model", "parallel_strategy", "parallel_strategy_kwargs"),
    ),
    Word(
        ("ray.train.report(metrics, checkpoint)", "ray.train.get_checkpoint()"),
        f"{NOTHING} each checkpoint is reported where train.py wrote it, with the row of metrics.jsonl; the "
        "same command goes on from the newest",
    ),
)
