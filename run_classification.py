#!/usr/bin/env python
"""Fine-tunes a pretrained audio model to classify emotion in speech, with transformers' Trainer.

    accelerate launch run_classification.py recipes/demo.json
    accelerate launch run_classification.py recipes/thorsten_wav2vec2.json --data_dir /data/thorsten --seed 2

It trains, validates after each epoch, and tests the best model once, on speakers or sentences that it has not heard.
The output folder then holds the model (for `pipeline("audio-classification")`), the results, a prediction for each
test clip, the splits, figures, and the recipe that repeats the run.
"""

import logging

from speech_emotion.startup import answer_at_once

if __name__ == "__main__":
    answer_at_once()

from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer

from speech_emotion.arguments import parse_arguments
from speech_emotion.augmentation import build_augmentation
from speech_emotion.batching import Collator, LengthBucketSampler, TrainingRows, padding_share
from speech_emotion.corpora import load_corpus
from speech_emotion.cross_corpus import load_others
from speech_emotion.errors import run_as_command
from speech_emotion.features import build_extraction, prepare_splits
from speech_emotion.frozen import cache_frozen
from speech_emotion.lora import add_adapters, merge_adapters
from speech_emotion.metrics import compute_results, evaluate_logits
from speech_emotion.modeling import build_model, may_skip_parameters, wants_attention_mask
from speech_emotion.optimization import build_loss
from speech_emotion.outcome import calibrate, finish_run
from speech_emotion.protocols import run_protocol
from speech_emotion.publishing import PublishCheckpoints
from speech_emotion.session import ProgressSentences, describe_run, open_session, prepare_for_speed
from speech_emotion.splits import SPLITS_FILE, split_corpus, write_splits
from speech_emotion.trainer_parts import TrainerParts

logger = logging.getLogger("run_classification")


def main(argv=None):
    # One run, or one a fold, a seed or a share of the data, if the recipe asks for that.
    return run_protocol(parse_arguments(argv), train)


def train(arguments):
    # What is asked for; everything that can be wrong with it is said now.
    data, training = arguments.data, arguments.training
    session = open_session(arguments)

    # Clips, and who of them is heard in training. One process downloads and prepares, the others wait for it.
    with training.main_process_first(desc="loading the corpus"):
        corpus = load_corpus(arguments)
    split = split_corpus(corpus, data, arguments.split_seed)
    label_names = split.clips.features["label"].names
    others = load_others(arguments, label_names)

    # The model, and from it what a clip has to become.
    model, feature_extractor, window_seconds = build_model(arguments.model, label_names, data.max_length_seconds, training.seed)
    add_adapters(model, arguments.model)
    extraction = build_extraction(model, feature_extractor, window_seconds)
    augmentation = build_augmentation(data)
    overwrite = data.overwrite_cache and training.local_process_index == 0
    with training.main_process_first(desc="extracting features"):
        prepared = prepare_splits(
            split, extraction, bool(augmentation), data.on_bad_audio,
            arguments.model.cache_dir, data.preprocessing_num_workers, overwrite,
        )  # fmt: skip
    multiple = round((training.pad_to_seconds or 0) * extraction.sampling_rate) or 1
    collate = Collator(extraction, wants_attention_mask(model.config), augmentation, multiple)
    with training.main_process_first(desc="computing what is frozen"):
        prepared, collate, layer_scores = cache_frozen(model, prepared, collate, arguments.model, training, overwrite)
    prepare_for_speed(model, training)

    # Training: our batches, loss, optimizer and schedule in transformers' loop.
    clips_per_step = training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    train_labels = prepared.train["labels"][:]
    sampler = LengthBucketSampler(
        prepared.train["length"][:], clips_per_step, training.seed, training.bucket_by_length,
        train_labels if training.class_balanced_sampling else None,
    )  # fmt: skip
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = may_skip_parameters(model)
    trainer = EmotionTrainer(
        sampler=sampler,
        model=model,
        args=training,
        train_dataset=TrainingRows(prepared.train, training.seed),
        eval_dataset=prepared.validation,
        processing_class=feature_extractor,
        data_collator=collate,
        compute_loss_func=build_loss(train_labels, len(label_names), training),
        compute_metrics=lambda p: compute_results(evaluate_logits(p.predictions, prepared.validation, label_names)),
        # Some models also return hidden states, which nobody here needs to gather.
        preprocess_logits_for_metrics=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    for callback in (ProgressSentences(), *session.tracker.callbacks):
        trainer.add_callback(callback)
    if session.publisher is not None and training.hub_strategy == "every_save":
        trainer.add_callback(PublishCheckpoints(session.publisher))
    if training.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training.early_stopping_patience))
    if trainer.is_world_process_zero():
        write_splits(prepared.split, session.output_dir / SPLITS_FILE)
        session.tracker.log_setup(session.recipe, prepared.split)
    logger.info(describe_run(arguments, prepared, model, padding_share(sampler, training.train_batch_size)))
    train_results = trainer.train(resume_from_checkpoint=session.checkpoint).metrics

    # The best model by validation is in place now. The test split is touched here, once.
    validation = evaluate_split(trainer, prepared.validation, label_names, "eval")
    temperature = calibrate(model, validation, training)
    merge_adapters(model, arguments.model, session.output_dir, trainer.is_world_process_zero())
    trainer.save_model()
    test = evaluate_split(trainer, prepared.test, label_names, "test")
    history = trainer.state.log_history
    return finish_run(session, prepared, extraction, train_results, validation, test, history, layer_scores, temperature, others)


class EmotionTrainer(TrainerParts, Trainer):
    """Trainer with the sampler, optimizer and schedule that the hand-written loop uses too."""


def evaluate_split(trainer, table, label_names, prefix):
    """Returns the model's answer for each clip of a split."""
    trainer.compute_metrics = None  # the results with their intervals are computed from the logits
    return evaluate_logits(trainer.predict(table, metric_key_prefix=prefix).predictions, table, label_names)


if __name__ == "__main__":
    run_as_command(main)
