#!/usr/bin/env python
"""The same recipes as run_classification.py, with the training loop written out in PyTorch.

    python run_classification_no_trainer.py recipes/demo.json
    torchrun --nproc_per_node 2 run_classification_no_trainer.py recipes/demo.json --use_cpu
    python run_classification_no_trainer.py recipes/demo.json --feature_extraction on_the_fly --dataloader_num_workers 2

Read it to see what `Trainer` does: data, splits, model, loss, optimizer, schedule and results are the very same
functions, so that only the loop differs, and both give the same losses step by step (tests/test_agreement.py). It writes
the same output folder. It validates and saves at each epoch's end.
"""

from speech_emotion.startup import answer_at_once

if __name__ == "__main__":
    answer_at_once(with_loop=True)

import contextlib
import json
import logging
import math
import random
import shutil
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from speech_emotion.arguments import parse_arguments
from speech_emotion.augmentation import build_augmentation
from speech_emotion.batching import BatchShard, ClipDataset, Collator, LengthBucketSampler, TrainingRows, padding_share
from speech_emotion.corpora import load_corpus
from speech_emotion.corpora.table import SPLITS
from speech_emotion.cross_corpus import load_others
from speech_emotion.errors import UserError, run_as_command
from speech_emotion.features import build_extraction, plan_splits, prepare_splits
from speech_emotion.frozen import cache_frozen
from speech_emotion.lora import add_adapters, merge_adapters
from speech_emotion.metrics import compute_results, evaluate_logits
from speech_emotion.modeling import build_model, load_weights, may_skip_parameters, save_checkpoint_model, wants_attention_mask
from speech_emotion.optimization import build_loss, build_optimizer, build_scheduler
from speech_emotion.outcome import calibrate, finish_run
from speech_emotion.protocols import run_protocol
from speech_emotion.report import write_json
from speech_emotion.session import CHECKPOINT_STATE, describe_run, open_session, prepare_for_speed
from speech_emotion.splits import SPLITS_FILE, split_corpus, write_splits

logger = logging.getLogger("run_classification_no_trainer")


def main(argv=None):
    # One run, or one a fold, a seed or a share of the data, if the recipe asks for that.
    return run_protocol(parse_arguments(argv, with_loop=True), train)


def train(arguments):
    # What is asked for.
    data, args = arguments.data, arguments.training
    check_supported(arguments)
    session = open_session(arguments)
    output_dir, tracker = session.output_dir, session.tracker

    # Clips, splits, model and features: the same road as with Trainer.
    with args.main_process_first(desc="loading the corpus"):
        corpus = load_corpus(arguments)
    split = split_corpus(corpus, data, arguments.split_seed)
    label_names = split.clips.features["label"].names
    others = load_others(arguments, label_names)
    model, feature_extractor, window_seconds = build_model(arguments.model, label_names, data.max_length_seconds, args.seed)
    add_adapters(model, arguments.model)
    extraction = build_extraction(model, feature_extractor, window_seconds)
    augmentation = build_augmentation(data)

    # A Dataset and a DataLoader. Either Dataset gives the same rows: from a cached table, or from the audio files.
    overwrite = data.overwrite_cache and args.local_process_index == 0
    if arguments.loop.feature_extraction == "map":
        with args.main_process_first(desc="extracting features"):
            prepared = prepare_splits(
                split, extraction, bool(augmentation), data.on_bad_audio,
                arguments.model.cache_dir, data.preprocessing_num_workers, overwrite,
            )  # fmt: skip
    else:
        prepared = plan_splits(split, extraction, bool(augmentation))
    multiple = round((args.pad_to_seconds or 0) * extraction.sampling_rate) or 1
    collate = Collator(extraction, wants_attention_mask(model.config), augmentation, multiple)
    with args.main_process_first(desc="computing what is frozen"):
        prepared, collate, layer_scores = cache_frozen(model, prepared, collate, arguments.model, args, overwrite)
    prepare_for_speed(model, args)
    if arguments.loop.feature_extraction == "map":
        rows = {"train": TrainingRows(prepared.train, args.seed), "validation": prepared.validation, "test": prepared.test}
    else:
        rows = {name: ClipDataset(split.clips, getattr(prepared, name), extraction, args.seed) for name in SPLITS}
    clips_per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    labels = prepared.train["labels"][:]
    sampler = LengthBucketSampler(
        prepared.train["length"][:], clips_per_step, args.seed, args.bucket_by_length,
        labels if args.class_balanced_sampling else None,
    )  # fmt: skip
    workers = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.device.type == "cuda",
    }
    train_batches = BatchShard(sampler, args.per_device_train_batch_size, args.process_index, args.world_size)
    train_loader = DataLoader(
        rows["train"], batch_sampler=train_batches, persistent_workers=args.dataloader_persistent_workers, **workers
    )

    # Model on its device, wrapped where several devices share the work; `model` stays the plain one, which is saved.
    model.to(args.device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    wrapped = wrap(model, arguments)
    compute_loss = build_loss(labels, len(label_names), args)
    optimizer = build_optimizer(model, args)
    accumulation = args.gradient_accumulation_steps
    steps_per_epoch = len(train_batches) // accumulation
    num_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    scheduler = build_scheduler(optimizer, args, num_steps)
    autocast = {"device_type": args.device.type, "dtype": torch.bfloat16 if args.bf16 else torch.float16,
                "enabled": args.bf16 or args.fp16}  # fmt: skip
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.fp16)

    def evaluate(name):
        """Returns the answers for each clip of a split and the mean loss; each process computes its share."""
        table, size = getattr(prepared, name), args.per_device_eval_batch_size
        batches = [list(range(start, min(start + size, len(table)))) for start in range(0, len(table), size)]
        mine = batches[args.process_index :: args.world_size]
        model.eval()
        answers = []
        with torch.no_grad(), torch.autocast(**autocast):
            for indices, batch in zip(mine, DataLoader(rows[name], batch_sampler=mine, **workers), strict=True):
                batch = {key: value.to(args.device, non_blocking=True) for key, value in batch.items()}
                labels = batch.pop("labels")
                outputs = model(**batch)
                answers.append((indices[0], outputs.logits.float().cpu().numpy(), compute_loss(outputs, labels, 1).item()))
        if args.world_size > 1:
            gathered = [None] * args.world_size
            dist.all_gather_object(gathered, answers)
            answers = [answer for part in gathered for answer in part]
        answers.sort(key=lambda answer: answer[0])  # back in the table's order
        logits = np.concatenate([logits for _, logits, _ in answers])
        return evaluate_logits(logits, table, label_names), sum(loss for *_, loss in answers) / len(table)

    # Where training stands; all of it is in a checkpoint, so that a resumed run goes on as if it had not stopped.
    state = {"global_step": 0, "epoch": 0, "best_metric": None, "best_model_checkpoint": None, "bad_epochs": 0,
             "log_history": []}  # fmt: skip
    set_seed(args.seed)
    if session.checkpoint:
        state = load_checkpoint(session.checkpoint, model, optimizer, scheduler, scaler, args)
    if args.process_index == 0:
        write_splits(prepared.split, output_dir / SPLITS_FILE)
        tracker.log_setup(session.recipe, prepared.split)
    logger.info(describe_run(arguments, prepared, model, padding_share(sampler, args.per_device_train_batch_size)))
    bar = tqdm(total=num_steps, initial=state["global_step"], desc="Training", unit="step", disable=args.process_index != 0)
    start_time, first_step = time.perf_counter(), state["global_step"]
    total_loss = torch.zeros((), device=args.device)
    patience = math.inf if args.early_stopping_patience is None else args.early_stopping_patience

    while state["global_step"] < num_steps and state["bad_epochs"] < patience:
        sampler.set_epoch(state["epoch"])
        batches = iter(train_loader)
        for _ in range(min(steps_per_epoch, num_steps - state["global_step"])):
            wrapped.train()
            # Forward and backward for each batch of this optimizer step. Each loss is a share of the whole step's, so
            # that the gradients add up to those of one large batch. DDP averages over the processes, hence the factor.
            losses = []
            for i in range(accumulation):
                batch = {key: value.to(args.device, non_blocking=True) for key, value in next(batches).items()}
                labels = batch.pop("labels")
                is_last = i == accumulation - 1
                no_sync = contextlib.nullcontext() if is_last or args.world_size == 1 else wrapped.no_sync()
                with no_sync, torch.autocast(**autocast):
                    loss = compute_loss(wrapped(**batch), labels, num_items_in_batch=clips_per_step) * args.world_size
                    scaler.scale(loss).backward()
                losses.append(loss.detach())

            total_loss += torch.stack(losses).sum()

            # Clip the gradients by their common norm, step, and start from zero.
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            learning_rate = scheduler.get_last_lr()[0]
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            state["global_step"] += 1
            bar.update(1)

            # What happened; a number is fetched from the device only when it is logged.
            if state["global_step"] % args.logging_steps == 0:
                loss = mean_over_processes(torch.stack(losses).sum(), args)
                epoch = state["epoch"] + (state["global_step"] % steps_per_epoch or steps_per_epoch) / steps_per_epoch
                entry = {"loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                         "epoch": epoch, "step": state["global_step"]}  # fmt: skip
                state["log_history"].append(entry)
                tracker.log_scalars(entry, state["global_step"], epoch)

        # Validate, remember the best, and save; the loop ends when nothing has got better for long enough.
        state["epoch"] += 1
        evaluation, eval_loss = evaluate("validation")
        metrics = {"eval_loss": eval_loss} | {f"eval_{name}": value for name, value in compute_results(evaluation).items()}
        state["log_history"].append(metrics | {"epoch": state["epoch"], "step": state["global_step"]})
        tracker.log_scalars(metrics, state["global_step"], state["epoch"])
        if args.process_index == 0:
            bar.write(f"Epoch {state['epoch']}: validation loss {eval_loss:.3f}, UAR {metrics['eval_uar']:.3f}")
        metric = metrics[f"eval_{args.metric_for_best_model.removeprefix('eval_')}"]
        folder = output_dir / f"checkpoint-{state['global_step']}"
        is_better = state["best_metric"] is None or (
            metric > state["best_metric"] if args.greater_is_better else metric < state["best_metric"]
        )
        if is_better:
            state |= {"best_metric": metric, "best_model_checkpoint": str(folder), "bad_epochs": 0}
        else:
            state["bad_epochs"] += 1
        save_checkpoint(folder, state, model, feature_extractor, optimizer, scheduler, scaler, args)
    bar.close()

    # The best model, by validation; the test split is touched here, once.
    seconds = time.perf_counter() - start_time
    num_done = state["global_step"] - first_step
    train_results = {"train_runtime": seconds, "train_loss": total_loss.item() / max(num_done, 1), "epoch": state["epoch"],
                     "train_samples_per_second": num_done * clips_per_step / seconds}  # fmt: skip
    if args.load_best_model_at_end and state["best_model_checkpoint"]:
        load_weights(model, state["best_model_checkpoint"])
    validation = evaluate("validation")[0]
    temperature = calibrate(model, validation, args)
    merge_adapters(model, arguments.model, output_dir, args.process_index == 0)
    if args.process_index == 0:
        model.save_pretrained(output_dir)
        feature_extractor.save_pretrained(output_dir)
    test = evaluate("test")[0]
    return finish_run(
        session, prepared, extraction, train_results, validation, test, state["log_history"], layer_scores, temperature, others
    )


def check_supported(arguments):
    """Raises `UserError` for what a recipe may ask of Trainer but not of this loop."""
    training, parallel = arguments.training, arguments.loop.parallel
    for key, allowed in (("eval_strategy", ("epoch",)), ("save_strategy", ("epoch",)), ("report_to", ([], ["comet_ml"])),
                         ("hub_strategy", ("end",))):  # fmt: skip
        value = getattr(training, key)
        if getattr(value, "value", value) not in allowed:
            known = " and ".join(map(str, allowed))
            raise UserError(f"key '{key}': the hand-written loop knows {known} only. Use run_classification.py.")
    for key in ("deepspeed", "fsdp", "auto_find_batch_size", "neftune_noise_alpha"):
        if getattr(training, key):
            raise UserError(f"key '{key}': the hand-written loop does not do that. Use run_classification.py.")
    if parallel == "ddp" and training.world_size == 1:
        raise UserError("key 'parallel': ddp needs several processes; start with torchrun or accelerate launch.")
    if parallel in ("none", "dp") and training.world_size > 1:
        raise UserError(f"key 'parallel': '{parallel}' is for one process, and {training.world_size} were started.")


def wrap(model, arguments):
    """Returns the model under DistributedDataParallel or DataParallel, or as it is."""
    training = arguments.training
    if training.world_size > 1:
        device_ids = [training.device] if training.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=may_skip_parameters(model))
    return DataParallel(model) if arguments.loop.parallel == "dp" else model


def mean_over_processes(value, training):
    """Averages a tensor over all processes."""
    if training.world_size > 1:
        dist.all_reduce(value)
        value /= training.world_size
    return value


def save_checkpoint(folder, state, model, feature_extractor, optimizer, scheduler, scaler, training):
    """Saves model and training state; the state's file is written last, so that a whole checkpoint is known by it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    rng |= {"cuda": torch.cuda.get_rng_state()} if training.device.type == "cuda" else {}
    torch.save(rng, folder / f"rng_{training.process_index}.pt")
    if training.world_size > 1:
        dist.barrier()
    if training.process_index == 0:
        save_checkpoint_model(model, folder)
        feature_extractor.save_pretrained(folder)
        progress = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        torch.save({name: part.state_dict() for name, part in progress.items()}, folder / "progress.pt")
        write_json(folder / CHECKPOINT_STATE, state)
        saved = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        spare = [path for path in saved if path != folder and str(path) != state["best_model_checkpoint"]]
        if training.save_total_limit is not None:
            for path in spare[: max(0, len(saved) - training.save_total_limit)]:
                shutil.rmtree(path)
    if training.world_size > 1:
        dist.barrier()  # no process reads a checkpoint that the main one is still writing


def load_checkpoint(checkpoint, model, optimizer, scheduler, scaler, training):
    """Loads all that `save_checkpoint` saved and returns the state."""
    load_weights(model, checkpoint)
    progress = torch.load(f"{checkpoint}/progress.pt", map_location=training.device, weights_only=True)
    for name, part in {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}.items():
        part.load_state_dict(progress[name])
    rng = torch.load(f"{checkpoint}/rng_{training.process_index}.pt", weights_only=False)
    torch.set_rng_state(rng["torch"])
    np.random.set_state(rng["numpy"])
    random.setstate(rng["python"])
    if "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"])
    with open(f"{checkpoint}/{CHECKPOINT_STATE}", encoding="utf-8") as file:
        return json.load(file)


if __name__ == "__main__":
    run_as_command(main)
